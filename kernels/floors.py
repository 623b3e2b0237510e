"""The least work that each op must do: floating-point operations, and bytes through device memory.

Each input is read once and each output written once; scratch memory is not counted, since a better kernel needs less of
it. No version runs faster than the larger of operations over the matrix units' rate and bytes over the memory's, so a
measured time over that is what is left to gain.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Floor:
    """Floating-point operations (a multiply-add is two) and bytes of device memory of one call."""

    flops: float
    bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The shortest time on a machine of these rates."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def contrastive_floor(pairs: int, embed_dim: int, itemsize: int, *, backward: bool) -> Floor:
    """Contrastive loss of [pairs, embed_dim] features: one product gives both log-sum-exps; backward recomputes it, and
    each of the two gradients is another. Features are read, gradients written.

    These 8 N^2 D are the floor of versions that keep no N x N matrix between the passes. One that keeps it does
    without the recomputation (6 N^2 D), and may be faster than this floor where the matrix fits.
    """
    features = 2 * pairs * embed_dim * itemsize
    product = 2 * pairs * pairs * embed_dim
    return Floor(4 * product, 2 * features) if backward else Floor(product, features)


def sigmoid_floor(pairs: int, embed_dim: int, itemsize: int, *, backward: bool) -> Floor:
    """Sigmoid loss of [pairs, embed_dim] features: one product gives value and G, since no sum must be known first, and
    each of the two gradients is another (6 N^2 D in all). Features are read, gradients written.
    """
    features = 2 * pairs * embed_dim * itemsize
    product = 2 * pairs * pairs * embed_dim
    return Floor(3 * product, 2 * features) if backward else Floor(product, features)


def info_nce_floor(pairs: int, queue: int, embed_dim: int, itemsize: int, *, backward: bool) -> Floor:
    """InfoNCE of [pairs, embed_dim] queries among their keys and [queue, embed_dim] negatives, gradients of the queries
    only: one product gives the sums; backward recomputes it, and the gradient is another.
    """
    row = embed_dim * itemsize
    product, reading = 2 * pairs * (queue + 1) * embed_dim, (2 * pairs + queue) * row
    return Floor(3 * product, reading + pairs * row) if backward else Floor(product, reading)


def nt_xent_floor(pairs: int, embed_dim: int, itemsize: int, *, backward: bool) -> Floor:
    """NT-Xent of 2 x [pairs, embed_dim] views, each among all: a logit serves two of them, so half a product gives the
    sums; backward recomputes it, and the gradient is a whole one.
    """
    views = 2 * pairs
    product, features = 2 * views * views * embed_dim, views * embed_dim * itemsize
    return Floor(2 * product, 2 * features) if backward else Floor(product / 2, features)


def attention_floor(
    batch: int, tokens: int, num_heads: int, head_dim: int, itemsize: int, *, causal: bool, backward: bool
) -> Floor:
    """Attention on a packed projection: two products forward; backward recomputes one of them and needs four more.

    Forward reads q, k, v and writes the output; backward reads q, k, v and the output's gradient, and writes three
    gradients. The output itself need not be read again: its product with the gradient follows from the other two.
    """
    scores = tokens * (tokens + 1) / 2 if causal else tokens * tokens
    product = 2 * batch * num_heads * scores * head_dim
    plane = batch * tokens * num_heads * head_dim * itemsize
    return Floor(7 * product, 11 * plane) if backward else Floor(2 * product, 4 * plane)


def attention_pool_floor(batch: int, queries: int, tokens: int, width: int, itemsize: int, *, backward: bool) -> Floor:
    """Attention of [batch, queries, width] on tokens that are keys and values at once: two products forward; backward
    recomputes one of them and needs four more.

    Forward reads queries and tokens and writes as much as the queries; with backward, both and the gradient are read,
    and gradients of both are written.
    """
    product = 2 * batch * queries * tokens * width
    query, key = (batch * rows * width * itemsize for rows in (queries, tokens))
    return Floor(7 * product, 5 * query + 3 * key) if backward else Floor(2 * product, 2 * query + key)


def layer_norm_floor(rows: int, width: int, itemsize: int, *, residual: bool, backward: bool) -> Floor:
    """Layer norm of [rows, width], with the addition of a residual or without, and float32 parameters.

    Forward reads the tensors that it adds and the parameters, and writes the result and the sum; backward reads what
    was normalised, the gradient of each result and the weight, and writes one gradient for all that was added, and
    those of the parameters. Mean and rstd of each row, in float32, come on top of that.
    """
    tensors = (4 if residual else 3) if backward else (4 if residual else 2)
    parameters = (3 if backward else 2) * width * 4
    return Floor((13 if backward else 8) * rows * width, tensors * rows * width * itemsize + parameters + 8 * rows)


def layer_norm_pair_floor(rows: int, width: int, itemsize: int, *, backward: bool) -> Floor:
    """Two layer norms in a row of [rows, width], with float32 parameters: forward reads one tensor and the parameters
    and writes two; backward reads that tensor, the gradients of both results and three parameters (the last bias is
    only added), and writes the gradients of the tensor and of four parameters. Means and rstds, in float32, come on
    top.
    """
    tensors, parameters = (4, 7) if backward else (3, 4)
    flops = (28 if backward else 16) * rows * width
    return Floor(flops, tensors * rows * width * itemsize + parameters * width * 4 + 16 * rows)


def bias_act_floor(rows: int, width: int, itemsize: int, *, backward: bool) -> Floor:
    """Activation of [rows, width] plus a float32 bias: forward reads one tensor and writes one; backward reads the
    gradient besides, and writes the bias's.
    """
    parameters = (2 if backward else 1) * width * 4
    return Floor(20 * rows * width, (3 if backward else 2) * rows * width * itemsize + parameters)


def patch_embed_floor(
    batch: int,
    channels: int,
    size: int,
    patch: int,
    embed_dim: int,
    pixel_bytes: int,
    itemsize: int,
    *,
    backward: bool,
    keep: int | None = None,
) -> Floor:
    """Patch embedding of square images: one product forward, one for the gradient of the weight.

    Forward reads pixels, weight, class token and positions and writes the tokens; backward reads pixels and the tokens'
    gradient and writes the gradients of weight and positions. Pixels get no gradient. Of ``keep`` patches an image,
    only their pixels and as many positions are read, and 8 bytes of index with them; every position has a gradient.
    """
    patches, k = (size // patch) ** 2, channels * patch * patch
    kept, index_bytes = (patches, 0) if keep is None else (keep, 8 * batch * keep)
    product = 2 * batch * kept * k * embed_dim
    pixels = batch * kept * k * pixel_bytes + index_bytes
    row = embed_dim * itemsize
    tokens, others = batch * (1 + kept) * row, (k + 1) * row  # weight and class token
    forward = pixels + others + (1 + kept) * row + tokens
    with_backward = 2 * (pixels + others + tokens) + (1 + kept) * row + (1 + patches) * row
    return Floor(2 * product, with_backward) if backward else Floor(product, forward)


def text_embed_floor(
    batch: int, tokens: int, vocab: int, width: int, itemsize: int, parameter_itemsize: int, *, backward: bool
) -> Floor:
    """Embedding of [batch, tokens] ids of 8 bytes from a table [vocab, width], as if each token were another row of it.

    Forward reads ids, rows and positions and writes the tokens. Backward reads ids and, for two sums that take it in
    different orders, twice the tokens' gradient, and writes the gradients of table and positions.
    """
    ids, elements = 8 * batch * tokens, batch * tokens * width
    positions = tokens * width * parameter_itemsize
    if not backward:
        return Floor(elements, ids + elements * (parameter_itemsize + itemsize) + positions)
    return Floor(2 * elements, ids + 2 * elements * itemsize + positions + vocab * width * parameter_itemsize)
