"""What stops a run that has begun."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what is left of the run."""


class NotFiniteError(TrainingError):
    """Loss or weights are infinite or NaN: there is nothing worth saving."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} not finite at step {step}: lower --lr, or set --grad-clip-norm")
