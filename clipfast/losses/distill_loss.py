"""OpenCLIP's ``DistillClipLoss``: the contrastive loss, and the cross-entropy of the logits against a teacher's.

With student features x, y and scale s, teacher features u, v and scale t, S = s x y^T and T = t u v^T [M, N]:

    P_S, P_T = softmax of S and T over each row                   Q_S, Q_T = the same over each column
    L_row = 1/M sum_i [log sum_j exp S_ij - sum_j P_T_ij S_ij]    L_col likewise    L = (L_row + L_col) / 2
    G = P_S - P_T + Q_S - Q_T, for M = N                          dL/dx = s/2N G y    dL/dy = s/2N G^T x
    dL/ds = 1/2N sum_i (G y)_i . x_i

The contrastive loss runs on the kernels. The cross-entropy with the teacher is plain PyTorch on every device. It goes
through strips of rows: a strip has complete rows, and maximum and sums of the columns are carried from strip to strip.
The backward pass recomputes the logits. Memory: a few strips of logits besides features and their gradients, never
N x N. FLOPs: 4 N^2 D forward and 8 N^2 D backward, in float32 (float64 for float64 features). Over several ranks, each
takes its b images among all texts and its b texts among all images: 8 b N D and 16 b N D.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.nn.functional import all_gather

from ..kernels.backends import outside_autocast
from ..kernels.contrastive.exchange import gather_equal
from ..kernels.contrastive.shared import check_pairs, scale_tensor
from ..kernels.dtypes import accumulate_dtype, autocast_dtype
from .clip_loss import ClipLoss

OP = "DistillClipLoss"
# The number of logits in a strip, and the least number of rows. About five matrices of a strip's size are in memory at
# once. They should fit into the cache of a CPU, and be large enough to fill a GPU. Products of fewer rows are slow.
STRIP_LOGITS = {"cpu": 2**20, "cuda": 2**24}
LEAST_ROWS = 64


class Logits(NamedTuple):
    """A matrix of logits by its factors, scale * rows @ cols.T; it is never in memory as a whole."""

    rows: Tensor  # [M, D]
    cols: Tensor  # [N, D]
    scale: Tensor  # []

    def of(self, strip: slice) -> Tensor:
        """Return the distillation loss's logits of some rows, [strip, N]."""
        return (self.scale * self.rows[strip]) @ self.cols.T


class Columns:
    """The log-sum-exp state of each column of logits: maximum and sum of exponentials, [N] each, updated per strip."""

    def __init__(self, cols: Tensor) -> None:
        self.maximum, self.sum = cols.new_full(cols.shape[:1], -torch.inf), cols.new_zeros(cols.shape[:1])

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add a strip of logits [rows, N]; return its exponentials and the factor [N] on sums over earlier strips."""
        before, self.maximum = self.maximum, torch.maximum(self.maximum, logits.amax(0))
        powers, factor = (logits - self.maximum).exp_(), (before - self.maximum).exp_()
        self.sum = self.sum * factor + powers.sum(0)
        return powers, factor


def _strips(logits: Logits) -> Iterator[slice]:
    """Return the slices of rows whose logits the distillation loss computes at a time."""
    num_rows, num_cols = len(logits.rows), len(logits.cols)
    budget = STRIP_LOGITS.get(logits.rows.device.type, STRIP_LOGITS["cpu"])
    rows = max(LEAST_ROWS, budget // max(num_cols, 1))
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


class Options(NamedTuple):
    """The arguments of the cross-entropy of student and teacher that are not tensors."""

    both: bool  # True computes L of the module's equations; False computes only L_row, where M may differ from N
    student_dtype: torch.dtype  # the student's features are rounded to it, as autocast rounds operands of products
    teacher_dtype: torch.dtype  # the teacher's features are rounded to it

    def logits(self, x: Tensor, y: Tensor, s: Tensor, u: Tensor, v: Tensor, t: Tensor) -> tuple[Logits, Logits]:
        """Return the logits of a distillation's student and teacher, with factors in the dtype of the product."""
        dtype = torch.promote_types(*map(accumulate_dtype, (self.student_dtype, self.teacher_dtype)))
        x, y = (side.to(self.student_dtype).to(dtype) for side in (x, y))
        u, v = (side.to(self.teacher_dtype).to(dtype) for side in (u, v))
        return Logits(x, y, s.to(dtype)), Logits(u, v, t.to(dtype))


class _CrossEntropy(torch.autograd.Function):
    """The cross-entropy of x [M, D], y [N, D], s [] against u [M, E], v [N, E], t [], which get no gradient."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any, x: Tensor, y: Tensor, s: Tensor, u: Tensor, v: Tensor, t: Tensor, options: Options
    ) -> Tensor:  # fmt: skip
        """Compute the cross-entropy of student and teacher for the distillation loss."""
        student, teacher = options.logits(x, y, s, u, v, t)
        total = student.scale.new_zeros(())
        of_student, of_teacher = Columns(student.cols), Columns(teacher.cols)
        # Column j adds log sum_i exp S_ij - sum_i Q_T_ij S_ij. With logits of 100 and a difference of 0.01, few digits
        # would remain, and so both terms are computed relative to the logit S_jj of the pair.
        weighted = torch.zeros_like(of_student.sum)
        pair = student.scale * torch.linalg.vecdot(student.rows, student.cols) if options.both else weighted
        for strip in _strips(student):
            S, T = student.of(strip), teacher.of(strip)
            total += F.cross_entropy(S, T.softmax(1), reduction="sum")
            if options.both:
                of_student.add(S)
                powers, factor = of_teacher.add(T)
                weighted = weighted * factor + powers.mul_(S.sub_(pair)).sum(0)
        if options.both:
            log_sum = of_student.maximum - pair + of_student.sum.log()
            total += (log_sum - weighted / of_teacher.sum).sum()
        ctx.options = options
        columns = (part for side in (of_student, of_teacher) for part in (side.maximum, side.sum))
        ctx.save_for_backward(x, y, s, u, v, t, *columns)
        return total / ((2 if options.both else 1) * len(x))

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the distillation loss."""
        needed = ctx.needs_input_grad[:3]
        grads = _Gradients.apply(grad_loss, ctx.options, needed, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return *grads, None, None, None, None


class _Gradients(torch.autograd.Function):
    """The gradients of :class:`_CrossEntropy`, as a function of its own, so a second derivative raises an error."""

    @staticmethod
    @outside_autocast
    def forward(
        _: Any, grad_loss: Tensor, options: Options, needed: tuple[bool, bool, bool], x: Tensor, y: Tensor, s: Tensor,
        u: Tensor, v: Tensor, t: Tensor, student_max: Tensor, student_sum: Tensor, teacher_max: Tensor,
        teacher_sum: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Compute the gradients of the distillation loss from its logits, strip by strip."""
        student, teacher = options.logits(x, y, s, u, v, t)
        needs_x, needs_y, needs_s = needed
        x_grad = torch.empty_like(student.rows) if needs_x else None
        y_grad = torch.zeros_like(student.cols) if needs_y else None
        s_grad = s.new_zeros((), dtype=torch.float64)
        for strip in _strips(student):
            S, T = student.of(strip), teacher.of(strip)
            G = S.softmax(1).sub_(T.softmax(1))
            if options.both:
                G.add_(S.sub_(student_max).exp_().div_(student_sum))
                G.sub_(T.sub_(teacher_max).exp_().div_(teacher_sum))
            if needs_x or needs_s:
                of_rows = G @ student.cols
                s_grad += (of_rows * student.rows[strip]).sum(dtype=torch.float64)
                if x_grad is not None:
                    x_grad[strip] = of_rows
            if y_grad is not None:
                y_grad.addmm_(G.T, student.rows[strip])
        coefficient = grad_loss / ((2 if options.both else 1) * max(len(x), 1))
        factor = coefficient * student.scale
        of_features = (None if grad is None else grad.mul_(factor).to(x.dtype) for grad in (x_grad, y_grad))
        return *of_features, (s_grad * coefficient).to(s.dtype) if needs_s else None

    @staticmethod
    def backward(*_: Any) -> None:
        """Refuse a second derivative of the distillation loss."""
        raise NotImplementedError(f"{OP}: the distillation loss has no second derivative")


def _cross_entropy(student: Logits, teacher: Logits, *, both: bool) -> Tensor:
    """Return the cross-entropy of the student's rows, and of its columns if ``both``, against the teacher's."""
    options = Options(both, autocast_dtype(student.rows), autocast_dtype(teacher.rows))
    return _CrossEntropy.apply(*student, *teacher, options)  # type: ignore[no-untyped-call]


class DistillClipLoss(ClipLoss):
    """A drop-in for ``open_clip.DistillClipLoss`` (3.3.0 and main) that never holds a matrix of logits.

    The arguments of the constructor, and value and gradients of the contrastive loss, are those of :class:`ClipLoss`.
    Value and gradients of the distillation loss equal OpenCLIP's in all four combinations of ``local_loss`` and
    ``gather_with_grad``, if the gradient of the loss is the same on every rank. No gradient flows to the teacher.
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Return the mean over rows of the cross-entropy of logits [N, M] against the softmax of a teacher's logits."""
        return F.cross_entropy(student_logits, teacher_logits.softmax(1))

    def forward(  # type: ignore[override]  # the arguments are OpenCLIP's, without a bias
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Compute the contrastive loss and the distillation loss of normalised features.

        Args:
            image_features, text_features, logit_scale: the student's, as for :class:`ClipLoss`.
            dist_image_features: [b, E], the teacher's, of the same images; any floating dtype and any width E.
            dist_text_features: [b, E], the teacher's, of the same texts.
            dist_logit_scale: the teacher's scale, one element.
            output_dict: return ``{"contrastive_loss": ..., "distill_loss": ...}`` instead of the two losses, scalars.

        Raises:
            ValueError, TypeError: as for :class:`ClipLoss`; and if the teacher's features do not fit, or need a
                gradient.
            RuntimeError: if there are several processes and ``torch.distributed`` is not initialised.
        """
        self._check_ranks()
        student = self._factors("image", image_features, text_features, logit_scale)
        teacher = self._factors("dist_image", dist_image_features, dist_text_features, dist_logit_scale)
        _check_teacher(student, teacher)
        contrastive = self._of_rank(image_features, text_features, logit_scale, None)
        distill = self._distillation(student, teacher)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _factors(self, name: str, image: Tensor, text: Tensor, scale: Tensor | float) -> Logits:
        """Return the factors of the logits of the student or the teacher of a distillation."""
        names = f"{name}_features", f"{name.replace('image', 'text')}_features"
        check_pairs(OP, names, image, text)
        scale_name = f"{name.removesuffix('image')}logit_scale"
        number = scale_tensor(OP, scale, image, name=scale_name, like_name=names[0])
        return Logits(image, text, number)

    def _distillation(self, student: Logits, teacher: Logits) -> Tensor:
        """Return the distillation loss of this rank's pairs."""
        if self.world_size <= 1:
            return _cross_entropy(student, teacher, both=True)
        # Each rank computes its own rows of both directions, with the columns of all ranks. The mean over ranks is the
        # loss of all rows, which OpenCLIP computes on every rank without ``local_loss``.
        student = student._replace(scale=self._scale_of_ranks(student.scale))
        is_constant = self.local_loss and not self.gather_with_grad
        images, texts = (self._of_all(side, constant=is_constant) for side in student[:2])
        teacher_images, teacher_texts = (self._of_all(side, constant=True) for side in teacher[:2])
        of_images = _cross_entropy(student._replace(cols=texts), teacher._replace(cols=teacher_texts), both=False)
        of_texts = _cross_entropy(
            Logits(student.cols, images, student.scale), Logits(teacher.cols, teacher_images, teacher.scale), both=False
        )
        return self._over_ranks((of_images + of_texts) / 2)

    def _scale_of_ranks(self, scale: Tensor) -> Tensor:
        """Return a distillation's scale with a gradient averaged over ranks, unless each rank has its own loss."""
        if self.local_loss or not scale.requires_grad:
            return scale
        # Each rank has the gradient of its own rows. Without ``gather_with_grad``, the mean of the losses over W ranks
        # divides the gradient by W; for features, the sum over ranks makes up for it; for the scale, ``factor`` does.
        factor = 1 if self.gather_with_grad else self.world_size
        return _MeanGradient.apply(scale, factor)  # type: ignore[no-untyped-call]

    @staticmethod
    def _of_all(features: Tensor, *, constant: bool) -> Tensor:
        """Gather the features [b, D] of every rank into [N, D] for distillation, without a gradient if ``constant``."""
        if constant:
            return gather_equal(features.detach(), None).flatten(0, 1)
        return torch.cat(all_gather(features.contiguous()))


class _MeanGradient(torch.autograd.Function):
    """The identity of a scalar, whose gradient is averaged over ranks and multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, factor: float) -> Tensor:
        """Return the scale of a distillation loss unchanged."""
        ctx.factor = factor
        return number.view_as(number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Compute the mean over ranks of the gradient of a distillation's scale."""
        total = grad.clone()
        dist.all_reduce(total)
        return total * (ctx.factor / dist.get_world_size()), None


def _check_teacher(student: Logits, teacher: Logits) -> None:
    """Refuse teacher features with another number of rows, on another device, or that require a gradient.

    Raises:
        ValueError: the teacher's features do not fit the student's, or they or the teacher's scale need a gradient.
    """
    if len(teacher.rows) != len(student.rows) or teacher.rows.device != student.rows.device:
        raise ValueError(
            f"{OP}: dist_image_features must have the {len(student.rows)} rows of image_features, on "
            f"{student.rows.device}, got {len(teacher.rows)} on {teacher.rows.device}"
        )
    names = "dist_image_features", "dist_text_features", "dist_logit_scale"
    for name, factor in zip(names, teacher, strict=True):
        if factor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OP}: {name} needs a gradient, but none flows to the teacher: give {name}.detach()")
