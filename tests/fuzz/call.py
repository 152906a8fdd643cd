"""A random call, which the rules of fuzzing are held against."""

from dataclasses import dataclass


@dataclass
class Call:
    """A function, its arguments, and the names of those that have the batch as their first axis."""

    function: object
    arguments: dict
    batched: tuple = ()
