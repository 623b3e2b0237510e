"""What stops a run that has begun."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what is left of the run."""


class NotFiniteError(TrainingError):
    """The weights are infinite or NaN: there is nothing worth saving."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)  # from which another process can make it again

    def __str__(self) -> str:
        return "{} not finite at step {}: lower --lr, or set --grad-clip-norm".format(*self.args)
