"""The backward passes: of the discrete solution, of the continuous adjoint equation, of the reversible solver."""
