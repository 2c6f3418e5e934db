"""Compiled loops for processors: the E8 lattice search, and LDLQ and coordinate descent inside a panel.

The same results in tensor form, for any device, come from `e8p.py` and `caldera/ldlq.py`; tests hold the two together.
Compiled at first use and cached on disk by numba; they release the GIL, so row ranges run in parallel threads. All are
in this one file, since numba's cache notices a change in the file of a function, but not in one that it calls.

Vectors are searched LANES at a time, coordinate by coordinate: arrays are (8, LANES), and the loops over lanes hold no
branch, so that the compiler turns them into vector instructions. One search takes about 30 ns instead of 400.
"""

import numpy as np
from numba import njit

E8P, E8P_E81, E8P_E8P, LEVELS = 0, 1, 2, 3  # kinds of codebook
LANES = 64
F0, HALF, ONE, TWO, THREE = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2), np.float32(3)
QUARTER, INF = np.float32(0.25), np.float32(np.inf)
I1, I7, I8 = np.int32(1), np.int32(7), np.int32(8)
# A sorting network for eight (19 comparators), as pairs of lines.
NETWORK = (
    (0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7), (0, 1), (2, 3),
    (4, 5), (6, 7), (2, 4), (3, 5), (1, 4), (3, 6), (1, 2), (3, 4), (5, 6),
)  # fmt: skip


@njit(nogil=True)
def _sizes(z, bit, n, size, norm, signs):
    """|z - shift| (8, n), its squared norm less its sum, and the signs as eight bits."""
    shift = QUARTER - HALF * np.float32(bit)
    for lane in range(n):
        norm[lane] = F0
        signs[lane] = 0
    for i in range(8):
        place = np.int32(I1 << i)
        for lane in range(n):
            y = z[i, lane] - shift
            a = abs(y)
            size[i, lane] = a
            norm[lane] += a * a - a
            signs[lane] |= place if y < F0 else np.int32(0)


@njit(nogil=True)
def _sort(size, n, keys):
    """Keys (8, n) sorted from large to small: the bits of a size, with its coordinate in the lowest three.

    Non-negative floats order as their bits do. The three bits change a size by 1e-6 of itself: a tie, to float32.
    """
    bits = size.view(np.int32)
    for i in range(8):
        for lane in range(n):
            keys[i, lane] = (bits[i, lane] & np.int32(-8)) | np.int32(i)
    for a, b in NETWORK:
        for lane in range(n):
            x, y = keys[a, lane], keys[b, lane]
            keys[a, lane] = max(x, y)
            keys[b, lane] = min(x, y)


@njit(nogil=True)
def _types(keys, n, norm, signs, words, dist, extra):
    """Nearest of the 227 patterns of norm <= 10, which are seven types: up to four 3/2, or one 5/2 and up to one 3/2.

    In each type large entries go to large coordinates, and a wrong parity is repaired at the smallest one, whose
    entry is 1/2. `words` gets mask of 3/2 | (1 + place of 5/2) << 8 | signs << 12; `extra` tells where a pattern of
    five 3/2 could still be nearer.
    """
    v = keys.view(np.float32)
    for lane in range(n):
        s = signs[lane]
        parity = s ^ (s >> 4)
        parity ^= parity >> 2
        parity = (parity ^ (parity >> 1)) & I1
        smallest = v[7, lane]
        even = smallest * np.float32(parity)  # what a repair costs when the number of 3/2 is even, and when it is odd
        odd = smallest - even
        t1 = v[0, lane]
        t2 = t1 + v[1, lane]
        t3 = t2 + v[2, lane]
        t4 = t3 + v[3, lane]
        t5 = t4 + v[4, lane]
        b0, b1 = I1 << (keys[0, lane] & I7), I1 << (keys[1, lane] & I7)
        m2 = b0 | b1
        m3 = m2 | (I1 << (keys[2, lane] & I7))
        m4 = m3 | (I1 << (keys[3, lane] & I7))
        five = ((keys[0, lane] & I7) + I1) << I8
        best, word, odds = even + ONE, np.int32(0), np.int32(0)  # distances are halved: (norm - top) / 2
        d = odd - t1 + TWO
        word, odds, best = (b0, I1, d) if d < best else (word, odds, best)
        d = even - t2 + THREE
        word, odds, best = (m2, np.int32(0), d) if d < best else (word, odds, best)
        d = odd - t3 + np.float32(4)
        word, odds, best = (m3, I1, d) if d < best else (word, odds, best)
        d = even - t4 + np.float32(5)
        word, odds, best = (m4, np.int32(0), d) if d < best else (word, odds, best)
        d = even - TWO * t1 + np.float32(4)
        word, odds, best = (five, np.int32(0), d) if d < best else (word, odds, best)
        d = odd - t1 - t2 + np.float32(5)
        word, odds, best = (five | b1, I1, d) if d < best else (word, odds, best)
        turn = (odds ^ parity) << (keys[7, lane] & I7)
        words[lane] = word | ((s ^ turn) << np.int32(12))
        dist[lane] = norm[lane] + TWO * best
        extra[lane] = odd - t5 + np.float32(6) < best


@njit(nogil=True)
def _extras(size, norm, sign, word, dist, lane, halves):
    """The 29 patterns with five 3/2 and three 1/2, one by one, against the nearest so far: (word, distance)."""
    total, smallest, parity = F0, INF, 0
    for i in range(8):
        total += size[i, lane]
        smallest = min(smallest, size[i, lane])
        parity ^= (sign >> i) & 1
    wrong, found = parity == 0, -1
    for e in range(29):
        h0, h1, h2 = size[halves[e, 0], lane], size[halves[e, 1], lane], size[halves[e, 2], lane]
        d = norm + TWO * (h0 + h1 + h2 - total) + np.float32(12)
        if wrong:
            d += TWO * min(min(h0, h1), min(h2, THREE * smallest))
        if d < dist:
            dist, found = d, e
    if found < 0:
        return word, dist
    mask, cheapest, at = 255, INF, 0
    for h in range(3):
        mask ^= 1 << halves[found, h]
    for i in range(8):
        cost = size[i, lane] * (ONE + TWO * np.float32((mask >> i) & 1))
        if cost < cheapest:
            cheapest, at = cost, i
    return mask | ((sign ^ (wrong << at)) << 12), dist


@njit(nogil=True)
def _search(z, bit, n, words, dist, scratch, halves):
    """Nearest E8P points of z (8, n) with one shift, exactly: their words and squared distances."""
    size, keys, norm, signs, extra = scratch
    _sizes(z, bit, n, size, norm, signs)
    _sort(size, n, keys)
    _types(keys, n, norm, signs, words, dist, extra)
    for lane in range(n):
        if extra[lane]:
            words[lane], dist[lane] = _extras(size, norm[lane], signs[lane], words[lane], dist[lane], lane, halves)


@njit(nogil=True)
def _emit(words, shift_bits, n, lookup, out, codes):
    """Values (8, n) and 16-bit codes of words."""
    for i in range(8):
        for lane in range(n):
            w = words[lane]
            m = ((w >> i) & I1) + (np.int32(2) if ((w >> I8) & np.int32(15)) == i + 1 else np.int32(0))
            sign = ONE - TWO * np.float32((w >> np.int32(12 + i)) & I1)
            out[i, lane] = (np.float32(m) + HALF) * sign + QUARTER - HALF * np.float32(shift_bits[lane])
    for lane in range(n):
        w = words[lane]
        codes[lane] = (lookup[w & 4095] << 8) | (((w >> 12) & 127) << 1) | shift_bits[lane]


@njit(nogil=True)
def _e8p(z, n, out, codes, work, lookup, halves):
    """Nearest E8P codewords of z (8, n), exactly."""
    words, dist, bits, scratch = work
    _search(z, 0, n, words[0], dist[0], scratch, halves)
    _search(z, 1, n, words[1], dist[1], scratch, halves)
    for lane in range(n):
        second = dist[1, lane] < dist[0, lane]
        bits[lane] = second
        words[0, lane] = words[1, lane] if second else words[0, lane]
    _emit(words[0], bits, n, lookup, out, codes)


@njit(nogil=True)
def _e81(x, lane, out):
    """Nearest of 256 E8 points (the 240 roots, 0, and 15 of norm 4) of x (8, lane): fills `out`, returns its code."""
    first, second, a1, a2 = 0, 0, -ONE, -ONE
    total, bits, parity, low, low_at = F0, 0, 0, INF, 0
    for i in range(8):
        a = abs(x[i, lane])
        total += a
        bits |= np.int64(x[i, lane] < F0) << i
        parity ^= x[i, lane] < F0
        if a < low:
            low, low_at = a, i
        if a > a1:
            second, a2, first, a1 = first, a1, i, a
        elif a > a2:
            second, a2 = i, a
        out[i, lane] = F0
    pair = TWO * (a1 + a2) - TWO
    half = total - TWO - (TWO * low if parity else F0)
    single = first * 2 + ((bits >> first) & 1)
    if single < 15 and 4 * a1 - 4 > max(pair, max(half, F0)):
        out[first, lane] = TWO - np.float32(4) * np.float32((bits >> first) & 1)
        return 241 + single
    if pair >= half and pair > F0:
        i, j = min(first, second), max(first, second)
        out[i, lane] = ONE - TWO * np.float32((bits >> i) & 1)
        out[j, lane] = ONE - TWO * np.float32((bits >> j) & 1)
        index = i * 8 - (i * (i + 1)) // 2 + (j - i - 1)
        return index * 4 + 2 * ((bits >> i) & 1) + ((bits >> j) & 1)
    if half > F0:
        bits ^= parity << low_at
        for i in range(8):
            out[i, lane] = HALF - np.float32((bits >> i) & 1)
        return 112 + (bits & 127)
    return 240


@njit(nogil=True)
def _residual(z, n, kind, residual, out, codes, work, rest, total, low, high, lookup, halves):
    """E8P, then a second codebook on what remains; of the two shifts the one that ends nearer is kept."""
    words, dist, bits, scratch = work
    best = dist[2]
    for bit in range(2):
        _search(z, bit, n, words[0], dist[0], scratch, halves)
        for lane in range(n):
            bits[lane] = bit
        first = total[bit]
        _emit(words[0], bits, n, lookup, first, low)
        for i in range(8):
            for lane in range(n):
                rest[i, lane] = (z[i, lane] - first[i, lane]) * residual
        second = total[2]
        if kind == E8P_E81:
            for lane in range(n):
                high[lane] = _e81(rest, lane, second)
        else:
            _e8p(rest, n, second, high, work, lookup, halves)
        for lane in range(n):
            d = F0
            for i in range(8):
                first[i, lane] = first[i, lane] + second[i, lane] / residual
                d += (z[i, lane] - first[i, lane]) ** 2
            if bit == 0 or d < best[lane]:
                best[lane] = d
                codes[lane] = low[lane] | (high[lane] << 16)
                for i in range(8):
                    out[i, lane] = first[i, lane]


@njit(nogil=True)
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


@njit(nogil=True)
def _nearest(z, n, out, codes, book, work, extra):
    """Codes (n,) and values `out` (group, n) of the codewords nearest to z (group, n)."""
    kind, residual, lookup, halves, levels = book
    if kind == LEVELS:
        for lane in range(n):
            codes[lane] = _level(z[0, lane], levels)
            out[0, lane] = levels[codes[lane]]
    elif kind == E8P:
        _e8p(z, n, out, codes, work, lookup, halves)
    else:
        rest, total, low, high = extra
        _residual(z, n, kind, residual, out, codes, work, rest, total, low, high, lookup, halves)


@njit(nogil=True)
def _scratch():
    f, i = np.empty((8, LANES), np.float32), np.empty((8, LANES), np.int32)
    flat = (f, i, np.empty(LANES, np.float32), np.empty(LANES, np.int32), np.empty(LANES, np.bool_))
    work = (np.empty((2, LANES), np.int32), np.empty((3, LANES), np.float32), np.empty(LANES, np.int64), flat)
    rest, total = np.empty((8, LANES), np.float32), np.empty((3, 8, LANES), np.float32)
    return work, (rest, total, np.empty(LANES, np.int64), np.empty(LANES, np.int64))


@njit(cache=True, nogil=True)
def encode(x, book, codes, start, stop):
    """codes[r] = nearest codeword of x[r] (group,), for rows start..stop."""
    group = x.shape[1]
    work, extra = _scratch()
    z, out = np.empty((group, LANES), np.float32), np.empty((group, LANES), np.float32)
    for row in range(start, stop, LANES):
        n = min(LANES, stop - row)
        for lane in range(n):
            for i in range(group):
                z[i, lane] = x[row + lane, i]
        _nearest(z, n, out, codes[row : row + n], book, work, extra)


@njit(nogil=True, fastmath={"contract"})
def _carry(errors, n, rows, target, top):
    """target[c, top:top + n] += rows[:, c] @ errors (g, n) for every c; a group of eight in one sweep over target."""
    if errors.shape[0] == 8:
        e0, e1, e2, e3, e4, e5, e6, e7 = (
            errors[0], errors[1], errors[2], errors[3], errors[4], errors[5], errors[6], errors[7],
        )  # fmt: skip
        for c in range(rows.shape[1]):
            f0, f1, f2, f3 = rows[0, c], rows[1, c], rows[2, c], rows[3, c]
            f4, f5, f6, f7 = rows[4, c], rows[5, c], rows[6, c], rows[7, c]
            out = target[c, top : top + n]
            for lane in range(n):
                low = (f0 * e0[lane] + f1 * e1[lane]) + (f2 * e2[lane] + f3 * e3[lane])
                high = (f4 * e4[lane] + f5 * e5[lane]) + (f6 * e6[lane] + f7 * e7[lane])
                out[lane] += low + high
    else:
        for c in range(rows.shape[1]):
            out = target[c, top : top + n]
            for i in range(errors.shape[0]):
                f, e = rows[i, c], errors[i]
                for lane in range(n):
                    out[lane] += f * e[lane]


@njit(nogil=True, fastmath={"contract"})
def _add_loss(gap, n, block, mixed, lost):
    """lost (n,) += |B^T gap|^2 of each lane of gap (g, n), B (g, g) lower triangular."""
    for j in range(gap.shape[0]):
        for lane in range(n):
            mixed[lane] = F0
        for i in range(j, gap.shape[0]):
            b = block[i, j]
            for lane in range(n):
                mixed[lane] += b * gap[i, lane]
        for lane in range(n):
            lost[lane] += mixed[lane] * mixed[lane]


@njit(nogil=True)
def _scales_at(scale, zero, column, top, n, found):
    """Scales, their inverses and zeros of the lanes' rows top..top + n at a column, from arrays (1 | m, 1 | n)."""
    at = column if scale.shape[1] > 1 else 0
    for lane in range(n):
        row = top + lane if scale.shape[0] > 1 else 0
        s = scale[row, at]
        found[0, lane], found[1, lane], found[2, lane] = s, (ONE / s if s > F0 else F0), zero[row, at]


@njit(cache=True, nogil=True)
def ldlq_panel(weight, target, feedback, blocks, scale, zero, book, first, last, values, codes, lost, start, stop):
    """LDLQ over the columns first..last of the rows start..stop; feedback from later columns is in `target` already.

    All but scales and feedback are transposed, (columns, rows): a lane is a row, and neighbours lie side by side.
    `lost` (m,) float64 gathers each row's loss, |(target - values) B|^2 of every group, with its block B of `blocks`.
    """
    group = weight.shape[0] // codes.shape[0]
    work, extra = _scratch()
    gap, mixed = np.empty((group, LANES), np.float32), np.empty(LANES, np.float32)
    z, out = np.empty((group, LANES), np.float32), np.empty((group, LANES), np.float32)
    found, scales = np.empty(LANES, np.int64), np.empty((3, LANES), np.float32)
    for top in range(start, stop, LANES):
        n = min(LANES, stop - top)
        for column in range(last - group, first - group, -group):
            _scales_at(scale, zero, column, top, n, scales)
            for i in range(group):
                wanted = target[column + i, top : top + n]
                for lane in range(n):
                    z[i, lane] = (wanted[lane] - scales[2, lane]) * scales[1, lane]
            _nearest(z, n, out, found, book, work, extra)
            codes[column // group, top : top + n] = found[:n]
            for i in range(group):
                value, exact = values[column + i, top : top + n], weight[column + i, top : top + n]
                wanted = target[column + i, top : top + n]
                for lane in range(n):
                    value[lane] = out[i, lane] * scales[0, lane] + scales[2, lane]
                    z[i, lane] = exact[lane] - value[lane]
                    gap[i, lane] = wanted[lane] - value[lane]
            _add_loss(gap, n, blocks[column // group], mixed, lost[top : top + n])
            _carry(z, n, feedback[column : column + group, first:column], target[first:column], top)


@njit(cache=True, nogil=True)
def tune_panel(gradient, moments, inverses, scale, zero, book, first, last, values, codes, start, stop):
    """One pass of coordinate descent over the columns first..last: a group moves only where the loss falls.

    gradient = H (W - Q)^T, kept current inside the panel; inverses (n/g, g, g) are those of H's diagonal blocks. All
    but these, H and the scales are transposed, (columns, rows).
    """
    group = values.shape[0] // codes.shape[0]
    work, extra = _scratch()
    z, out = np.empty((group, LANES), np.float32), np.empty((group, LANES), np.float32)
    found, scales = np.empty(LANES, np.int64), np.empty((3, LANES), np.float32)
    for top in range(start, stop, LANES):
        n = min(LANES, stop - top)
        for column in range(last - group, first - group, -group):
            block = inverses[column // group]
            _scales_at(scale, zero, column, top, n, scales)
            for i in range(group):
                for lane in range(n):
                    step = F0
                    for j in range(group):
                        step += gradient[column + j, top + lane] * block[j, i]
                    z[i, lane] = (values[column + i, top + lane] + step - scales[2, lane]) * scales[1, lane]
            _nearest(z, n, out, found, book, work, extra)
            moved = False
            for lane in range(n):
                row = top + lane
                for i in range(group):
                    z[i, lane] = values[column + i, row] - (out[i, lane] * scales[0, lane] + scales[2, lane])
                change = F0
                for i in range(group):
                    curve = TWO * gradient[column + i, row]
                    for j in range(group):
                        curve += moments[column + i, column + j] * z[j, lane]
                    change += z[i, lane] * curve
                if found[lane] == codes[column // group, row] or change >= F0:
                    z[:, lane] = F0
                    continue
                moved = True
                codes[column // group, row] = found[lane]
                for i in range(group):
                    values[column + i, row] = out[i, lane] * scales[0, lane] + scales[2, lane]
            if moved:
                _carry(z, n, moments[column : column + group, first:last], gradient[first:last], top)


def no_tables() -> tuple[np.ndarray, np.ndarray]:
    """Empty lattice tables, for codebooks that have none."""
    return np.zeros(1, np.int32), np.zeros((1, 3), np.int32)
