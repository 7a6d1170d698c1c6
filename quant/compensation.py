"""Error-compensated rounding: codes whose errors cancel in the layer's output, by the moments of its inputs.

Rounding a weight W [C, n] to the nearest levels makes each weight's own error least, not the layer's output error
tr((W - W') S (W - W')^T), S = E[x x^T] of its inputs (quant/calibration.py). Going through the columns, each is rounded
to its nearest levels and its error spread over the columns to come, so that they make up for it as well as numbers that
are not rounded could (OBQ, Frantar and Alistarh, 2022; GPTQ, Frantar et al., 2023): with U the upper Cholesky factor of
the inverse of S, column j's error e_j leaves W[:, k] - e_j U[j, k] / U[j, j] for k > j. Any table of levels will do.
"""

from dataclasses import replace

import torch

BLOCK = 128  # columns whose errors reach those behind the block in one product
DAMPING = 0.1  # of the mean diagonal of S, added to it
MOST_DAMPING = 1.0


@torch.no_grad()
def compensated_codes(weight, quantizer, parameters, moments, damping=DAMPING, by_diagonal=True):
    """Codes (uint8, shape of `weight` [C, ...]) under a quantizer's `parameters`, by the `moments` of the inputs.

    No output channel has a greater output error than by nearest rounding, whose codes it keeps where compensation would
    raise it. `damping` is added to the moments' diagonal, in units of its mean; with `by_diagonal` the columns of the
    largest inputs come first. ValueError for moments of another number of inputs.
    """
    rows, tables = _as_rows(weight), {name: parameters[name] for name in quantizer.tables}
    if len(moments.mean) != rows.shape[1]:
        raise ValueError(f"the moments are of {len(moments.mean)} inputs, and the weight has {rows.shape[1]}")
    second = moments.second.to(rows.device, rows.dtype)
    nearest = quantizer.encode(weight, tables).reshape(rows.shape)
    found = _compensate(rows, quantizer, tables, second, damping, by_diagonal)
    if found is None:
        return nearest.reshape(weight.shape)

    def errors(codes):
        return output_errors(rows, quantizer.decode(codes.reshape(weight.shape), tables), second)

    better = errors(found) < errors(nearest)
    return torch.where(better[:, None], found, nearest).reshape(weight.shape)


def output_errors(weight, quantized, second):
    """Each output channel's mean squared output error [C]: d S d^T of its difference d, S = `second` [n, n]."""
    difference = _as_rows(weight) - _as_rows(quantized)
    return ((difference @ second.to(difference)) * difference).sum(dim=1)


def _as_rows(weight):
    """[C, n] in float32, or float64 as the weight."""
    return weight.reshape(len(weight), -1).to(torch.promote_types(weight.dtype, torch.float32))


def _compensate(rows, quantizer, tables, second, damping, by_diagonal):
    """Codes [C, n] of rows [C, n]; None if nothing is known of the inputs."""
    diagonal = second.diagonal()
    if not diagonal.sum() > 0:
        return None
    order = diagonal.argsort(descending=True, stable=True) if by_diagonal else torch.arange(len(diagonal))
    factor = _inverse_factor(second[order][:, order], damping)
    work, codes = rows[:, order].T.contiguous(), torch.empty_like(rows, dtype=torch.uint8).T  # columns are rows here
    column_of = _column_rounder(quantizer, tables)
    for first in range(0, len(work), BLOCK):
        last = min(first + BLOCK, len(work))
        errors = torch.empty_like(work[first:last])
        for j in range(first, last):
            column = int(order[j])
            codes[column], rounded = column_of(work[j], column)
            errors[j - first] = (work[j] - rounded) / factor[j, j]
            if j + 1 < last:
                work[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j - first], alpha=-1)
        work[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return codes.T.contiguous()


def _column_rounder(quantizer, tables):
    """A function (column [C], its number) -> (codes [C], the levels [C] that they stand for)."""
    group, alone = quantizer.group, replace(quantizer, group=None)

    def rounded(column, number):
        own = tables if group is None else {name: table[:, number // group] for name, table in tables.items()}
        codes = alone.encode(column[:, None], own)
        return codes[:, 0], alone.decode(codes, own)[:, 0].to(column.dtype)

    return rounded


def _inverse_factor(second, damping):
    """U, upper triangular, with U^T U the inverse of the damped moments [n, n].

    Of the moments with rows and columns in reverse, U is the reversed inverse of the lower Cholesky factor. An input that
    is always 0 bears no error, and takes none. Where the moments are of too low a rank to tell, more damping is tried.
    """
    mean = second.diagonal().mean()
    dead = second.diagonal() == 0
    while True:
        damped = second.clone()
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = mean
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed or damping > MOST_DAMPING:
            break
        damping = max(10 * damping, 1e-6)
    eye = torch.eye(len(second), dtype=second.dtype, device=second.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
