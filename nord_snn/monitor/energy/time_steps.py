"""Find the products and outputs of a network that repeat in each time step, from ``time_steps`` or from shapes."""

from dataclasses import dataclass, field
from typing import Any

from nord_snn.monitor.energy.report import ProductCost

__all__ = ["Shape", "TimeSteps", "check_time_steps"]

#: Shape of the input of a module; empty if it has no tensor with at least two dimensions.
Shape = tuple[int, ...]


def check_time_steps(time_steps: Any) -> None:
    """Raise a ValueError unless ``time_steps`` is None or a positive integer."""
    if time_steps is not None and (type(time_steps) is not int or time_steps < 1):
        raise ValueError(f"time_steps must be a positive integer, or None to infer it, got {time_steps!r}")


@dataclass
class TimeSteps:
    """Record the calls of neurons; infer T and the products that repeat in each time step.

    Neurons process whole sequences ``[T, N, *]``, or single time steps in a loop of T calls.

    Attributes:
        stated: T from the caller; None: T is inferred.
    """

    stated: int | None = None
    _sequences: dict[str, int] = field(default_factory=dict)  # layer of neurons -> T of its last call
    _longest: int = 0
    _rows: set[Shape] = field(default_factory=set)  # [N, *] of sequences [T, N, *, D]
    _single_steps: dict[str, int] = field(default_factory=dict)  # layer of neurons -> number of calls

    def add_sequence(self, name: str, shape: Shape) -> None:
        """Record the spikes ``[T, N, *, D]`` of neurons that processed a sequence."""
        self._sequences[name] = shape[0]
        self._longest = max(self._longest, shape[0])
        self._rows.add(shape[1:-1])

    def add_single_step(self, name: str) -> None:
        """Record a call of neurons for one time step."""
        self._single_steps[name] = self._single_steps.get(name, 0) + 1

    @property
    def number(self) -> int:
        """Return T of the network."""
        return self.stated or max(self._sequence_length, self._loop_length)

    @property
    def in_sequences(self) -> bool:
        """Return whether tensors have a time dimension, so that a module is called once for all time steps."""
        if self.stated is None:
            return self._sequence_length > 1
        return bool(self._sequences) or not self._single_steps

    @property
    def _sequence_length(self) -> int:
        return self.stated or max(self._sequences.values(), default=1)

    @property
    def _loop_length(self) -> int:
        """Return the number of single time steps, over all sequences."""
        return max(self._single_steps.values(), default=1)

    @property
    def _batches(self) -> set[int]:
        """Return N of all sequences ``[T, N, *, D]``."""
        return {rows[0] for rows in self._rows if rows}

    def check(self) -> None:
        """Raise a ValueError if the stated T contradicts the neurons."""
        T = self.stated
        if T is None:
            return
        if self._sequences and self._longest != T:
            raise ValueError(f"time_steps is {T}, but the neurons processed sequences of {self._longest} time steps")
        if not self._sequences and self._single_steps and self._loop_length % T:
            raise ValueError(
                f"time_steps is {T}, but the neurons were called for {self._loop_length} single time steps"
            )

    def repeats(self, shape: Shape) -> bool:
        """Return whether outputs in a module with this input are computed in each of T time steps."""
        if not self.in_sequences:
            return self.number > 1
        return self._sequence_length == self.number and self._has_time(shape)

    def steps_of(self, product: ProductCost, shape: Shape, op_steps: int | None) -> int:
        """Return T if a product is computed in each time step, else 1.

        Args:
            product: all calls of one product.
            shape: shape of the input of its module.
            op_steps: number of time steps in one call of the op; None if its cost has no such number.
        """
        if self.in_sequences:
            length = self._sequence_length
            return length if (self._has_time(shape) if op_steps is None else op_steps == length) else 1
        return self.number if self.runs_in_loop(product) else 1

    def runs_in_loop(self, product: ProductCost) -> bool:
        """Return whether a product is called once in each of T single time steps."""
        if self.in_sequences:
            return False
        return product.calls == self.number if self.stated is None else product.calls % self._loop_length == 0

    def _has_time(self, shape: Shape) -> bool:
        """Return whether the first dimension is time ``[T, N, *]``, or time and rows ``[T * N, *]``."""
        T = self._sequence_length
        if not shape:
            return False
        if shape[0] in {T * N for N in self._batches}:
            return True
        if len(shape) < 3:
            return self.stated is not None and () in self._rows and shape[0] == T  # neurons without rows, [T, D]
        if shape[0] != T or T not in self._batches:
            return shape[0] == T
        # N equals T: the input is [T, N, *] if its second dimension is a batch size and it is not one time step, [N, *, D].
        return shape[1] in self._batches and shape[:-1] not in self._rows
