"""Compiled loops for processors: the E8 lattice search, and LDLQ and coordinate descent inside a panel.

The same arithmetic in tensor form, for any device, is in `e8p.py` and `caldera/ldlq.py`; tests hold the two together.
Compiled at first use and cached on disk by numba; they release the GIL, so row ranges run in parallel threads.
"""

import numpy as np
from numba import njit

E8P, E8P_E81, E8P_E8P, LEVELS = 0, 1, 2, 3  # which codebook `_round` uses
F0, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
QUARTER, INF = np.float32(0.25), np.float32(np.inf)


@njit(inline="always")
def _free_point(y, m, neg):
    """Nearest half-integer point of even sum, any norm: |v| = m + 1/2 and signs; returns the squared distance."""
    parity, worst, worst_at, up, dist = 0, -ONE, 0, False, F0
    for i in range(8):
        a = abs(y[i])
        m[i] = np.int32(a)
        neg[i] = y[i] < F0
        r = a - (np.float32(m[i]) + HALF)
        dist += r * r
        parity += m[i] + neg[i]
        if abs(r) > worst:
            worst, worst_at, up = abs(r), i, r >= F0
    if parity & 1:  # move the coordinate that is nearest to its next half-integer
        dist += ONE - TWO * worst
        if up:
            m[worst_at] += 1
        elif m[worst_at] > 0:
            m[worst_at] -= 1
        else:
            neg[worst_at] = not neg[worst_at]
    return dist


@njit(inline="always")
def _pattern(m, lut):
    """Index of |v| in the table of 256, or -1."""
    key = 0
    for i in range(8):
        if m[i] > 2:
            return -1
        key = key * 3 + m[i]
    return lut[key]


@njit(inline="always")
def _cheapest_flip(y, m):
    """Coordinate whose wrong sign costs least, and half that cost."""
    cost, at = INF, 0
    for i in range(8):
        c = abs(y[i]) * (TWO * np.float32(m[i]) + ONE)
        if c < cost:
            cost, at = c, i
    return cost, at


@njit(inline="always")
def _table_point(y, m, neg, order, lut, halves, bound):
    """Nearest table point when the free one is not in the table; INF when nothing beats `bound`.

    The 227 patterns of norm <= 10 are seven types: up to four 3/2, or one 5/2 and up to one 3/2. In each, large
    entries go to large coordinates and a wrong parity is repaired at the smallest one, whose entry is 1/2. The
    29 patterns of norm 12 with five 3/2 are compared one by one, when their common bound allows.
    """
    norm, total, parity = F0, F0, 0
    for i in range(8):
        a = abs(y[i])
        norm += a * a
        total += a
        neg[i] = y[i] < F0
        parity += neg[i]
        j = i
        while j > 0 and abs(y[order[j - 1]]) < a:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i
    smallest = abs(y[order[7]])  # its entry is 1/2 in all seven types, so it is the cheapest sign to turn
    best, best_j, best_l, top = bound, -1, 0, F0
    for j in range(5):
        if j > 0:
            top += abs(y[order[j - 1]])
        flip = smallest if (parity + j) & 1 else F0
        dist = norm - total - TWO * (top - flip) + np.float32(2 + 2 * j)
        if dist < best:
            best, best_j, best_l = dist, j, 0
        if j < 2:  # the largest coordinate takes 5/2, the next j take 3/2
            with_5 = TWO * abs(y[order[0]]) + (abs(y[order[1]]) if j == 1 else F0)
            dist = norm - total - TWO * (with_5 - flip) + np.float32(8 + 2 * j)
            if dist < best:
                best, best_j, best_l = dist, j, 1
    top += abs(y[order[4]])
    common = norm - TWO * (total * np.float32(1.5)) + np.float32(12)
    extra = -1
    wrong = (parity + 5) & 1
    if norm - total - TWO * (top - (smallest if wrong else F0)) + np.float32(12) < best:
        for e in range(29):
            h0, h1, h2 = halves[e, 0], halves[e, 1], halves[e, 2]
            dist = common + TWO * (abs(y[h0]) + abs(y[h1]) + abs(y[h2]))
            if dist < best:
                if wrong:
                    flip = np.float32(3) * smallest
                    for h in (h0, h1, h2):
                        flip = min(flip, abs(y[h]))
                    dist += TWO * flip
                if dist < best:
                    best, extra = dist, e
    if extra >= 0:
        for i in range(8):
            m[i] = 1
        for h in range(3):
            m[halves[extra, h]] = 0
        if wrong:
            _, at = _cheapest_flip(y, m)
            neg[at] = not neg[at]
        return best
    if best_j < 0:
        return INF
    for i in range(8):
        m[order[i]] = 0
    for i in range(best_j):
        m[order[i + best_l]] = 1
    if best_l:
        m[order[0]] = 2
    if (parity + best_j) & 1:
        neg[order[7]] = not neg[order[7]]
    return best


@njit(inline="always")
def _search(x, bit, bound, y, m, neg, order, lut, halves):
    """Nearest point of x (8,) with one shift, if nearer than `bound`: (pattern, squared distance), else (-1, INF)."""
    shift = QUARTER - HALF * np.float32(bit)
    for i in range(8):
        y[i] = x[i] - shift
    dist = _free_point(y, m, neg)
    if dist >= bound:
        return -1, INF
    index = _pattern(m, lut)
    if index < 0:
        dist = _table_point(y, m, neg, order, lut, halves, bound)
        if dist >= bound:
            return -1, INF
        index = _pattern(m, lut)
    return index, dist


@njit(inline="always")
def _emit(index, bit, m, neg, out):
    """Code of a point, and its values in `out`; without branches, which would be guessed wrong half of the time."""
    shift = QUARTER - HALF * np.float32(bit)
    bits = 0
    for i in range(8):
        out[i] = (np.float32(m[i]) + HALF) * (ONE - TWO * np.float32(neg[i])) + shift
        bits |= np.int64(neg[i]) << i
    return (index << 8) | ((bits & 127) << 1) | bit


@njit(cache=True, nogil=True)
def _e8p(x, out, y, m0, m1, order, neg0, neg1, lut, halves):
    """Nearest E8P codeword of x (8,), exactly: fills `out`, returns its 16-bit code."""
    index0, dist = _search(x, 0, INF, y, m0, neg0, order, lut, halves)
    index1, _ = _search(x, 1, dist, y, m1, neg1, order, lut, halves)
    if index1 < 0:
        return _emit(index0, 0, m0, neg0, out)
    return _emit(index1, 1, m1, neg1, out)


@njit(cache=True, nogil=True)
def _e81(x, out):
    """Nearest of 256 E8 points (the 240 roots, 0, and 15 of norm 4) of x (8,): fills `out`, returns its 8-bit code."""
    first, second, a1, a2 = -1, -1, -ONE, -ONE
    total, bits, parity, low, low_at = F0, 0, 0, INF, 0
    for i in range(8):
        a = abs(x[i])
        total += a
        if x[i] < F0:
            bits |= 1 << i
            parity ^= 1
        if a < low:
            low, low_at = a, i
        if a > a1:
            second, a2, first, a1 = first, a1, i, a
        elif a > a2:
            second, a2 = i, a
    pair = TWO * (a1 + a2) - TWO
    half = total - TWO - (TWO * low if parity else F0)
    for i in range(8):
        out[i] = F0
    single = first * 2 + (1 if x[first] < F0 else 0)
    if 4 * a1 - 4 > max(pair, max(half, F0)) and single < 15:
        out[first] = -TWO if x[first] < F0 else TWO
        return 241 + single
    if pair >= half and pair > F0:
        i, j = min(first, second), max(first, second)
        out[i] = -ONE if x[i] < F0 else ONE
        out[j] = -ONE if x[j] < F0 else ONE
        index = i * 8 - (i * (i + 1)) // 2 + (j - i - 1)
        return index * 4 + 2 * (x[i] < F0) + (x[j] < F0)
    if half > F0:
        if parity:
            bits ^= 1 << low_at
        for i in range(8):
            out[i] = -HALF if (bits >> i) & 1 else HALF
        return 112 + (bits & 127)
    return 240


@njit(cache=True, nogil=True)
def _residual(x, kind, residual, out, y, m0, m1, order, neg0, neg1, first, rest, total, lut, halves):
    """E8P, then a second codebook on what remains; of the two shifts the one that ends nearer is kept."""
    best, code = INF, 0
    for bit in range(2):
        index, _ = _search(x, bit, INF, y, m0, neg0, order, lut, halves)
        low = _emit(index, bit, m0, neg0, first)
        for i in range(8):
            rest[i] = (x[i] - first[i]) * residual
        if kind == E8P_E81:
            high = _e81(rest, total)
        else:
            high = _e8p(rest, total, y, m0, m1, order, neg0, neg1, lut, halves)
        dist = F0
        for i in range(8):
            total[i] = first[i] + total[i] / residual
            dist += (x[i] - total[i]) ** 2
        if dist < best:
            best, code = dist, low | (high << 16)
            for i in range(8):
                out[i] = total[i]
    return code


@njit(cache=True, nogil=True)
def _level(x, levels):
    """Index of the nearest of the sorted levels."""
    low, high = 0, levels.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if x > HALF * (levels[middle] + levels[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _round(x, out, book, scratch):
    """Nearest codeword of x (group,) in the codebook: fills `out`, returns the code."""
    kind, residual, lut, halves, levels = book
    if kind == LEVELS:
        code = _level(x[0], levels)
        out[0] = levels[code]
        return code
    y, first, rest, total, m0, m1, order, neg0, neg1 = scratch
    if kind == E8P:
        return _e8p(x, out, y, m0, m1, order, neg0, neg1, lut, halves)
    return _residual(x, kind, residual, out, y, m0, m1, order, neg0, neg1, first, rest, total, lut, halves)


@njit(cache=True, nogil=True)
def _scratch():
    f, ints, neg = np.empty((4, 8), np.float32), np.empty((3, 8), np.int32), np.empty((2, 8), np.bool_)
    return f[0], f[1], f[2], f[3], ints[0], ints[1], ints[2], neg[0], neg[1]


@njit(cache=True, nogil=True)
def encode(x, book, codes, start, stop):
    """codes[r] = nearest codeword of x[r] (group,), for rows start..stop."""
    scratch = _scratch()
    out = np.empty(x.shape[1], np.float32)
    for row in range(start, stop):
        codes[row] = _round(x[row], out, book, scratch)


@njit(cache=True, nogil=True)
def _carry(errors, rows, target):
    """target (p,) += errors (g,) @ rows (g, p); a group of eight in one sweep, so that target is read once."""
    if errors.shape[0] == 8:
        e0, e1, e2, e3 = errors[0], errors[1], errors[2], errors[3]
        e4, e5, e6, e7 = errors[4], errors[5], errors[6], errors[7]
        r0, r1, r2, r3, r4, r5, r6, r7 = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]
        for c in range(target.shape[0]):
            low = (e0 * r0[c] + e1 * r1[c]) + (e2 * r2[c] + e3 * r3[c])
            high = (e4 * r4[c] + e5 * r5[c]) + (e6 * r6[c] + e7 * r7[c])
            target[c] += low + high
    else:
        for i in range(errors.shape[0]):
            e, row = errors[i], rows[i]
            for c in range(target.shape[0]):
                target[c] += e * row[c]


@njit(cache=True, nogil=True)
def ldlq_panel(weight, target, feedback, scale, zero, book, first, last, values, codes, start, stop):
    """LDLQ over the columns first..last of the rows start..stop; feedback from later columns is in `target` already."""
    group = weight.shape[1] // codes.shape[1]
    scratch = _scratch()
    z, out, error = np.empty(group, np.float32), np.empty(group, np.float32), np.empty(group, np.float32)
    for row in range(start, stop):
        for column in range(last - group, first - group, -group):
            s = scale[row % scale.shape[0], column % scale.shape[1]]
            offset = zero[row % zero.shape[0], column % zero.shape[1]]
            inverse = ONE / s if s > F0 else F0
            for i in range(group):
                z[i] = (target[row, column + i] - offset) * inverse
            codes[row, column // group] = _round(z, out, book, scratch)
            for i in range(group):
                values[row, column + i] = out[i] * s + offset
                error[i] = weight[row, column + i] - values[row, column + i]
            _carry(error, feedback[column : column + group, first:column], target[row, first:column])


@njit(cache=True, nogil=True)
def tune_panel(gradient, moments, inverses, scale, zero, book, first, last, values, codes, start, stop):
    """One pass of coordinate descent over the columns first..last: a group moves only where the loss falls.

    gradient = (W - Q) H, kept current inside the panel; inverses (n/g, g, g) are those of H's diagonal blocks.
    """
    group = values.shape[1] // codes.shape[1]
    scratch = _scratch()
    z, out, move = np.empty(group, np.float32), np.empty(group, np.float32), np.empty(group, np.float32)
    for row in range(start, stop):
        for column in range(last - group, first - group, -group):
            s = scale[row % scale.shape[0], column % scale.shape[1]]
            offset = zero[row % zero.shape[0], column % zero.shape[1]]
            inverse = ONE / s if s > F0 else F0
            block = column // group
            for i in range(group):
                step = F0
                for j in range(group):
                    step += gradient[row, column + j] * inverses[block, j, i]
                z[i] = (values[row, column + i] + step - offset) * inverse
            code = _round(z, out, book, scratch)
            if code == codes[row, block]:
                continue
            change = F0
            for i in range(group):
                move[i] = values[row, column + i] - (out[i] * s + offset)
            for i in range(group):
                curve = F0
                for j in range(group):
                    curve += moments[column + i, column + j] * move[j]
                change += move[i] * (TWO * gradient[row, column + i] + curve)
            if change >= F0:
                continue
            codes[row, block] = code
            for i in range(group):
                values[row, column + i] = out[i] * s + offset
            _carry(move, moments[column : column + group, first:last], gradient[row, first:last])


def no_tables() -> tuple[np.ndarray, np.ndarray]:
    """Empty lattice tables, for codebooks that have none."""
    return np.zeros(1, np.int32), np.zeros((1, 3), np.int32)
