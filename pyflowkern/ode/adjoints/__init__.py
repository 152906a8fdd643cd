"""The backward passes: through the discrete solution, by the continuous adjoint equation, of the reversible solver."""
