"""FLOPs of the kernels that multiply matrices, from a recorded launch; a multiply-add is two."""

from collections.abc import Callable

from .launch import Launch


def launch_flops(launch: Launch) -> int:
    """Return the FLOPs of a launch's matrix products; zero for a kernel that has none.

    ``_pairs_kernel`` counts as zero: for the logits of unit features it computes no product of matrices.
    """
    count = _FLOPS.get(launch.kernel.__name__)
    return 0 if count is None else count(launch)


def _block(launch: Launch) -> int:
    """Return the FLOPs of a block of logits: one product of [M, D] and [N, D] features."""
    return 2 * launch.args["M"] * launch.args["N"] * launch.args["D"]


def _block_products(launch: Launch) -> int:
    """Return the FLOPs of the gradients of features x and y: G y and G^T x, where G is the gradient of the logits.

    The first ``num_x_tiles`` programs compute G y, the others G^T x. A launch may lack the programs of one of the two.
    """
    of_x = launch.args["num_x_tiles"]
    return ((of_x > 0) + (launch.grid[0] > of_x)) * _block(launch)


def _scores(launch: Launch) -> int:
    """Return the FLOPs of one product of attention. Every score counts, even if a causal mask hides it."""
    return 2 * launch.args["q_ptr"].numel() * launch.args["N"]


def _pooling(launch: Launch) -> int:
    """Return the FLOPs of one product of all tokens with the queries of their image or sequence."""
    return 2 * launch.args["x_ptr"].numel() * launch.args["H"]


def _patches(launch: Launch) -> int:
    """Return the FLOPs of one product of patches [ROWS, K] and the weight [E, K].

    If the patches are laid out as a matrix, class tokens are rows of it too.
    """
    return 2 * launch.args["ROWS"] * launch.args["E"] * launch.args["K"]


_FLOPS: dict[str, Callable[[Launch], int]] = {
    "_stats_kernel": _block,
    "_grad_tile_kernel": _block,
    "_sigmoid_sums_kernel": _block,
    "_sigmoid_grad_tile_kernel": _block,
    "_products_kernel": _block_products,
    "_strip_products_kernel": _block,
    "_gradients_kernel": _block_products,
    "_short_fwd_kernel": lambda launch: 2 * _scores(launch),
    "_looped_fwd_kernel": lambda launch: 2 * _scores(launch),
    "_pool_fwd_kernel": lambda launch: 2 * _pooling(launch),
    "_short_bwd_kernel": lambda launch: 5 * _scores(launch),
    "_unrolled_bwd_kernel": lambda launch: 5 * _scores(launch),
    "_query_bwd_kernel": lambda launch: 3 * _scores(launch),
    "_key_bwd_kernel": lambda launch: 4 * _scores(launch),
    "_pool_bwd_kernel": lambda launch: 5 * _pooling(launch),
    "_tokens_kernel": _patches,
    "_weight_sums_kernel": _patches,
    "_patch_embed_fwd_kernel": _patches,
    "_patch_embed_bwd_weight_kernel": _patches,
    "_patch_embed_bwd_images_kernel": _patches,
}
