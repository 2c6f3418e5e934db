"""Compiled Viterbi search of the trellis code, and LDLQ and coordinate descent with it.

Costs live in planes: the state g B + j, with B = 2^bits, lies at [j G + g], so that the loops over states run over
neighbours. The winner among B predecessors is kept in the lowest bits of its cost, which orders positive floats as
their bits do: one integer minimum finds both.
"""

import numpy as np
from numba import njit

# the format's constants, which numba's cache takes for granted: it looks at this file alone for changes
from caldera.quantizers import trellis
from caldera.quantizers.trellis import RUN, STATE_BITS, STATES, WARM

FAR, BLOCKED = np.float32(trellis.FAR), np.float32(trellis.BLOCKED)
F0, LARGEST = np.float32(0), np.float32(3e38)


@njit(nogil=True, fastmath=True)
def _edge(rows, part):
    """First row of a sequence."""
    return rows * part // -(-rows // RUN)


@njit(nogil=True)
def _is_short(rows, bits):
    parts = -(-rows // RUN)
    return -(-rows // parts) * bits < 2 * STATE_BITS


def _viterbi_of(bits):
    """The search at a number of bits, which the compiler must know to use vector instructions."""
    many = 1 << bits
    groups = STATES >> bits
    short = groups >> bits
    mask = np.int32(~(many - 1))

    @njit(nogil=True, fastmath=True)
    def viterbi(x, code, opening, scratch, states):
        """States of the cheapest path through x (T,); the one before x[0] and the last agree on `opening`, if >= 0."""
        cost, best, back = scratch
        bits_of, floats = cost.view(np.int32), best.view(np.float32)
        cost[:] = F0 if opening < 0 else BLOCKED
        if opening >= 0:
            for top in range(many):
                state = top * groups + opening
                cost[(state % many) * groups + state // many] = F0
        for t in range(x.shape[0]):
            value, row = x[t], back[t]
            for j in range(many):
                plane = bits_of[j * groups : (j + 1) * groups]
                for u in range(short):
                    least = plane[u] & mask
                    for top in range(1, many):
                        least = min(least, (plane[top * short + u] & mask) | np.int32(top))
                    best[u * many + j] = least
            for g in range(groups):
                row[g] = np.uint8(best[g] & np.int32(many - 1))
            for j in range(many):
                own, plane = code[j * groups : (j + 1) * groups], cost[j * groups : (j + 1) * groups]
                for g in range(groups):
                    gap = value - own[g]
                    plane[g] = floats[g] + gap * gap
        _trace_back(x.shape[0], bits, cost, back, opening, states)

    return viterbi


@njit(nogil=True)
def _trace_back(length, bits, cost, back, opening, states):
    groups = STATES >> bits
    state, least = np.int64(0), LARGEST
    for at in range(STATES):
        candidate = (at % groups) * (1 << bits) + at // groups
        if cost[at] < least and (opening < 0 or candidate & (groups - 1) == opening):
            state, least = np.int64(candidate), cost[at]
    for t in range(length - 1, -1, -1):
        states[t] = state
        group = state >> bits
        state = (np.int64(back[t, group]) << (STATE_BITS - bits)) | group


_viterbi_1, _viterbi_2, _viterbi_3, _viterbi_4 = (_viterbi_of(bits) for bits in (1, 2, 3, 4))


@njit(nogil=True)
def _search(x, bits, code, opening, scratch, states):
    if bits == 1:
        _viterbi_1(x, code, opening, scratch, states)
    elif bits == 2:
        _viterbi_2(x, code, opening, scratch, states)
    elif bits == 3:
        _viterbi_3(x, code, opening, scratch, states)
    else:
        _viterbi_4(x, code, opening, scratch, states)


@njit(nogil=True)
def _scratch(bits):
    groups = STATES >> bits
    back = np.empty((max(RUN, 2 * WARM), groups), np.uint8)
    around = np.empty(2 * WARM, np.float32), np.empty(max(RUN, 2 * WARM), np.int64)
    return (np.empty(STATES, np.float32), np.empty(groups, np.int32), back), around


@njit(nogil=True)
def _encode_run(x, short, book, scratch, codes, values):
    """Codes (T,) and values (T,) of the closed sequence nearest to x (T,), whose outliers it clips."""
    bits, code, levels, step = book
    if short:
        return _encode_short(x, bits, step, codes, values)
    search, (around, states) = scratch
    length, mask = x.shape[0], np.int64((1 << bits) - 1)
    for t in range(length):
        x[t] = min(max(x[t], -FAR), FAR)
    for i in range(2 * WARM):
        around[i] = x[(i - WARM) % length]
    _search(around, bits, code, -1, search, states)
    opening = states[WARM - 1] & ((STATES >> bits) - 1)
    _search(x, bits, code, opening, search, states)
    for t in range(length):
        codes[t], values[t] = states[t] & mask, levels[states[t]]


@njit(nogil=True)
def _encode_short(x, bits, step, codes, values):
    top = np.float32((1 << bits) - 1)
    for t in range(x.shape[0]):
        level = min(max(np.rint(x[t] / step + top / 2), F0), top)
        codes[t], values[t] = np.int64(level), (level - top / 2) * step


@njit(cache=True, nogil=True)
def encode(z, book, codes, start, stop):
    """Codes (m, n) of the columns of z (m, n), for the sequences in the rows start..stop."""
    scratch, m = _scratch(book[0]), z.shape[0]
    x, found, values = np.empty(RUN, np.float32), np.empty(RUN, np.int64), np.empty(RUN, np.float32)
    for part in range(-(-m // RUN)):
        top, end = _edge(m, part), _edge(m, part + 1)
        if top < start or end > stop:
            continue
        n = end - top
        for column in range(z.shape[1]):
            for i in range(n):
                x[i] = z[top + i, column]
            _encode_run(x[:n], _is_short(m, book[0]), book, scratch, found[:n], values[:n])
            for i in range(n):
                codes[top + i, column] = found[i]


@njit(nogil=True)
def _scale_of(scale, row, column):
    return scale[row if scale.shape[0] > 1 else 0, column if scale.shape[1] > 1 else 0]


@njit(nogil=True, fastmath=True)
def _carry(errors, row, target, top):
    """target[c, top:top + T] += row[c] errors (T,) for every c."""
    n = errors.shape[0]
    for c in range(row.shape[0]):
        out, factor = target[c, top : top + n], row[c]
        for i in range(n):
            out[i] += factor * errors[i]


@njit(cache=True, nogil=True)
def ldlq_panel(weight, target, feedback, blocks, scale, zero, book, first, last, values, codes, lost, start, stop):
    """LDLQ over the columns first..last of the rows start..stop; feedback from later columns is in `target` already.

    All but scales and feedback are transposed, (columns, rows): a sequence lies side by side. `lost` (m,) float64
    gathers each row's loss, the squares of (target - values) B, with a column's B of `blocks` (n, 1, 1).
    """
    scratch, m = _scratch(book[0]), weight.shape[1]
    x, found, out = np.empty(RUN, np.float32), np.empty(RUN, np.int64), np.empty(RUN, np.float32)
    for part in range(-(-m // RUN)):
        top, end = _edge(m, part), _edge(m, part + 1)
        if top < start or end > stop:
            continue
        n = end - top
        for column in range(last - 1, first - 1, -1):
            for i in range(n):
                s = _scale_of(scale, top + i, column)
                x[i] = (target[column, top + i] - _scale_of(zero, top + i, column)) / s if s > F0 else F0
            _encode_run(x[:n], _is_short(m, book[0]), book, scratch, found[:n], out[:n])
            for i in range(n):
                row = top + i
                codes[column, row] = found[i]
                values[column, row] = out[i] * _scale_of(scale, row, column) + _scale_of(zero, row, column)
                lost[row] += ((target[column, row] - values[column, row]) * blocks[column, 0, 0]) ** 2
                out[i] = weight[column, row] - values[column, row]
            _carry(out[:n], feedback[column, first:column], target[first:column], top)


@njit(cache=True, nogil=True)
def tune_panel(gradient, moments, inverses, scale, zero, book, first, last, values, codes, start, stop):
    """One pass of coordinate descent over the columns first..last: a sequence moves only where the loss falls.

    gradient = H (W - Q)^T, kept current inside the panel; all but H and the scales are transposed, (columns, rows).
    """
    scratch, m = _scratch(book[0]), values.shape[1]
    x, found, out = np.empty(RUN, np.float32), np.empty(RUN, np.int64), np.empty(RUN, np.float32)
    for part in range(-(-m // RUN)):
        top, end = _edge(m, part), _edge(m, part + 1)
        if top < start or end > stop:
            continue
        n = end - top
        for column in range(last - 1, first - 1, -1):
            step, curve = inverses[column, 0, 0], moments[column, column]
            for i in range(n):
                row = top + i
                s, offset = _scale_of(scale, row, column), _scale_of(zero, row, column)
                wanted = values[column, row] + gradient[column, row] * step - offset
                x[i] = wanted / s if s > F0 else F0
            _encode_run(x[:n], _is_short(m, book[0]), book, scratch, found[:n], out[:n])
            change = F0
            for i in range(n):
                row = top + i
                out[i] = out[i] * _scale_of(scale, row, column) + _scale_of(zero, row, column)
                move = values[column, row] - out[i]
                change += move * (gradient[column, row] + gradient[column, row] + move * curve)
            if change >= F0:
                continue
            for i in range(n):
                row = top + i
                move = values[column, row] - out[i]
                codes[column, row], values[column, row] = found[i], out[i]
                out[i] = move
            _carry(out[:n], moments[column, first:last], gradient[first:last], top)
