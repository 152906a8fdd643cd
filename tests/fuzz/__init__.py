"""Random calls of everything public: against the reference and float64, with hostile numbers, types and layouts."""
