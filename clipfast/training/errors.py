"""What stops a run that has begun."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what is left of the run."""


def not_finite(what: str, step: int) -> TrainingError:
    """Return the error for a loss or weights that are not finite after ``step`` steps."""
    return TrainingError(
        f"{what} not finite at step {step}: lower --lr, or set --grad-clip-norm; the last checkpoint is from before"
    )
