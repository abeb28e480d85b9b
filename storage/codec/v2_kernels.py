"""The compiled part of version 2: one walk over a row, which writes or reads its entries.

Reader and writer must see the same contexts, so they share the walk. At each position it asks of
every candidate: is it kept, and at which level? The candidates are the usual successors of the
current token, then the ids kept at the longest earlier match (of up to 8 tokens), then the ids kept
at the position before. Only positions that are stored count as earlier, or as the one before. The
other entries are written as gaps between frequency ranks. All arithmetic is on integers, so every
CPU reads the same.

A writing walk lists the symbols and their contexts. A reading walk takes them from a rANS stream
(Duda, arXiv 1311.2540): 32-bit state, 16-bit words, probabilities in 1/32768.

`matches` and `tally` also serve version 3, and `same_entries` does alone.
"""

import numpy as np
from numba import njit

BITS = 15  # bits of a probability
ONE = 1 << BITS
LOW = 1 << 16  # the state's lower bound
LEVELS = 240  # levels with their own symbol; 16 more symbols stand for larger levels
SYMBOLS = 256
MAX_LEVEL = 4096  # exclusive
MATCH = 8  # tokens compared
HOPS = 16  # earlier occurrences tried

# Contexts of flags ("is the candidate kept?"): its class in the table of successors (64, or 6 of
# its frequency rank if it is not listed), its level at the match (absent, 7 classes, or no match),
# its level at the position before (absent, low, high), the length of the match.
LISTED, UNLISTED, EARLIER, BEFORE, LENGTHS = 64, 6, 9, 3, 4
FLAGS = (LISTED + UNLISTED) * EARLIER * BEFORE * LENGTHS
# Contexts of levels: not listed, or 8 classes of the usual level for ids kept seldom and 8 for ids
# kept often; one more context for escapes.
LEVEL = FLAGS
LEVEL_CONTEXTS = 17 * EARLIER + 1
ESCAPE = LEVEL + LEVEL_CONTEXTS  # bit lengths of gaps, by entries still to come
ESCAPE_CONTEXTS = 8
RAW = ESCAPE + ESCAPE_CONTEXTS  # RAW + n: n plain bits, n <= BITS
GAP_SYMBOLS = 24

OVERRUN, TOO_MANY, BAD_ID, BAD_LEVEL, LEFT_OVER = 1, 2, 3, 4, 5  # of reading, see v2.FAILURES


@njit(cache=True, nogil=True)
def matches(input_ids, positions):
    """For each position: the latest earlier one of the longest match or -1, the length.

    input_ids [T] is compared before both; positions [P], ascending, are the ones that may match.
    Their numbers in `positions` are returned.
    """
    size, tokens = len(positions), input_ids[positions]
    place, length = np.full(size, -1, np.int32), np.zeros(size, np.uint8)
    before = np.full(size, -1, np.int32)  # previous position of the same token
    order = np.argsort(tokens, kind="mergesort")
    for i in range(1, size):
        if tokens[order[i]] == tokens[order[i - 1]]:
            before[order[i]] = order[i - 1]
    for t in range(size):
        at, hops, here = before[t], 0, positions[t]
        while at >= 0 and hops < HOPS:
            same, there = 1, positions[at]
            while (
                same < MATCH and there >= same and input_ids[there - same] == input_ids[here - same]
            ):
                same += 1
            if same > length[t]:
                place[t], length[t] = at, same
            at, hops = before[at], hops + 1
    return place, length


@njit(cache=True, nogil=True)
def count(contexts, symbols, flags, tables):
    """Count each symbol in its context: flags [FLAGS, 2], tables [n, SYMBOLS]."""
    for i in range(len(contexts)):
        if contexts[i] < FLAGS:
            flags[contexts[i], symbols[i]] += 1
        elif contexts[i] < RAW:
            tables[contexts[i] - LEVEL, symbols[i]] += 1


@njit(cache=True, nogil=True)
def compress(contexts, symbols, chances, sums):
    """rANS: code the symbols from last to first -> uint16 words in reading order."""
    words = np.empty(len(symbols) + 2, np.uint16)
    at, state = len(words), np.uint64(LOW)
    for i in range(len(symbols) - 1, -1, -1):
        context, symbol = contexts[i], symbols[i]
        if context >= RAW:
            bits = BITS - (context - RAW)
            start, width = np.uint64(symbol << bits), np.uint64(1 << bits)
        elif context < FLAGS:
            chance = np.uint64(chances[context])
            start = chance * np.uint64(symbol)
            width = np.uint64(ONE) - chance if symbol else chance
        else:
            start = np.uint64(sums[context - LEVEL, symbol])
            width = np.uint64(sums[context - LEVEL, symbol + 1]) - start
        if state >= width << np.uint64(32 - BITS):
            at -= 1
            words[at] = state & np.uint64(0xFFFF)
            state >>= np.uint64(16)
        state = ((state // width) << np.uint64(BITS)) + state % width + start
    words[at - 1] = state & np.uint64(0xFFFF)
    words[at - 2] = state >> np.uint64(16)
    return words[at - 2 :].copy()


@njit(cache=True, nogil=True)
def level_symbol(level):
    """(symbol, plain bits, their value) of a level."""
    if level < LEVELS:
        return level, 0, 0
    rest, bits = level - LEVELS + 1, 0
    while rest >> (bits + 1):
        bits += 1
    return LEVELS + bits, bits, rest - (1 << bits)


@njit(cache=True, nogil=True)
def refill(state, words, at):
    """Take a word if the state is low; past the end take 0, which the caller sees in `at`."""
    if state < LOW:
        word = np.uint32(words[at]) if at < len(words) else np.uint32(0)
        return (state << np.uint32(16)) | word, at + 1
    return state, at


@njit(cache=True, nogil=True)
def take_raw(state, words, at, bits):
    shift = np.uint32(BITS - bits)
    value = (state & np.uint32(ONE - 1)) >> shift
    state = ((state >> np.uint32(BITS)) << shift) + (
        state & ((np.uint32(1) << shift) - np.uint32(1))
    )
    state, at = refill(state, words, at)
    return np.int64(value), state, at


@njit(cache=True, nogil=True)
def take_symbol(state, words, at, sums, hints, row):
    """Take a symbol of the distribution sums[row]; hints[row] says where its search starts."""
    low = state & np.uint32(ONE - 1)
    symbol = np.int64(hints[row, low >> np.uint32(BITS - 8)])
    while sums[row, symbol + 1] <= low:
        symbol += 1
    base = np.uint32(sums[row, symbol])
    width = np.uint32(sums[row, symbol + 1]) - base
    state = width * (state >> np.uint32(BITS)) + low - base
    state, at = refill(state, words, at)
    return symbol, state, at


@njit(cache=True, nogil=True)
def sort(ids, begin, end):
    """Put ids[begin:end] in ascending order; most ranges hold two or three."""
    if end - begin > 16:
        ids[begin:end] = np.sort(ids[begin:end])
        return
    for i in range(begin + 1, end):
        value, j = ids[i], i
        while j > begin and ids[j - 1] > value:
            ids[j] = ids[j - 1]
            j -= 1
        ids[j] = value


@njit(cache=True, nogil=True)
def walk(
    reading, input_ids, positions, counts, spreads, ids, levels,
    starts, listed, kinds, order, rank_of, rank_kinds, level_kinds, shift,
    chances, sums, hints, words, contexts, symbols,
):  # fmt: skip
    """Write (list contexts and symbols) or read (fill ids and levels) the entries of a row.

    input_ids [T]; positions [P]: where in it; counts, spreads [P]: entries and the best one's
    level; ids, levels [E]: by descending level, 0 for the last. Returns (failure or 0, symbols
    listed).
    """
    vocab = len(order)
    # One word per id: position + 1, then 4 bits of EARLIER, 2 of BEFORE, 1 if already asked
    tags = np.zeros(vocab, np.uint32)
    wanted = np.full(
        0 if reading else vocab, -1, np.int64
    )  # writing: position << 16 | level of a kept id
    heads = np.full(MAX_LEVEL, -1, np.int32)  # reading: lists of entries by level
    following = np.empty(max(1, int(counts.max()) if len(counts) else 1), np.int32)
    found, missing = np.empty_like(following), np.empty_like(following)
    offsets = np.zeros(len(counts) + 1, np.int64)
    for t in range(len(counts)):
        offsets[t + 1] = offsets[t] + counts[t]
    place, length = matches(input_ids, positions)
    written, at = 0, 0
    state = np.uint32(LOW)
    if reading:
        if len(words) < 2:
            return OVERRUN, 0
        state, at = (np.uint32(words[0]) << np.uint32(16)) | np.uint32(words[1]), 2
    for t in range(len(counts)):
        count, spread = np.int64(counts[t]), np.int64(spreads[t])
        if count == 0:
            continue
        token, earlier = input_ids[positions[t]], np.int64(place[t])
        longest = min(np.int64(length[t]), LENGTHS) - 1 if earlier >= 0 else 0
        stamp = np.uint32((t + 1) << 8)
        nowhere = EARLIER - 1 if earlier < 0 else 0
        if t > 0:
            for e in range(offsets[t - 1], offsets[t]):
                tags[ids[e]] = stamp | np.uint32(1 + (level_kinds[levels[e]] >= 4)) << np.uint32(1)
        if earlier >= 0:
            for e in range(offsets[earlier], offsets[earlier + 1]):
                old = tags[ids[e]]
                old = old if (old & np.uint32(0xFFFFFF00)) == stamp else stamp
                tags[ids[e]] = old | np.uint32(1 + level_kinds[levels[e]]) << np.uint32(3)
        if not reading:
            for e in range(offsets[t], offsets[t + 1]):
                wanted[ids[e]] = (t << 16) | levels[e]
        kept = 0
        for source in range(3):
            if source == 0:
                begin, end = np.int64(starts[token]), np.int64(starts[token + 1])
            elif source == 1:
                begin, end = (offsets[earlier], offsets[earlier + 1]) if earlier >= 0 else (0, 0)
            else:
                begin, end = (offsets[t - 1], offsets[t]) if t > 0 else (0, 0)
            for e in range(begin, end):
                token_id = listed[e] if source == 0 else ids[e]
                tag = tags[token_id]
                if (tag & np.uint32(0xFFFFFF00)) != stamp:
                    tag = stamp
                elif tag & np.uint32(1):
                    continue
                tags[token_id] = tag | np.uint32(1)
                before = np.int64(tag >> np.uint32(1)) & 3
                early = (np.int64(tag >> np.uint32(3)) & 15) or nowhere
                if source == 0:
                    kind = np.int64(kinds[e])
                    usual = 1 + (kind & 7) + (8 if kind >= LISTED // 2 else 0)
                else:
                    kind, usual = LISTED + np.int64(rank_kinds[token_id]), 0
                flag = ((kind * EARLIER + early) * BEFORE + before) * LENGTHS + longest
                context = LEVEL + usual * EARLIER + early
                if reading:
                    low, yes = state & np.uint32(ONE - 1), np.uint32(chances[flag])
                    # symbol 0: kept
                    if low >= yes:
                        state = (np.uint32(ONE) - yes) * (state >> np.uint32(BITS)) + low - yes
                        state, at = refill(state, words, at)
                        continue
                    state = yes * (state >> np.uint32(BITS)) + low
                    state, at = refill(state, words, at)
                    if kept == count:
                        return TOO_MANY, 0
                    level, state, at = take_level(state, words, at, context, shift, sums, hints)
                    if level > spread:
                        return BAD_LEVEL, 0
                else:
                    contexts[written] = flag
                    hit = wanted[token_id]
                    if hit < 0 or hit >> 16 != t:
                        symbols[written] = 1
                        written += 1
                        continue
                    symbols[written] = 0
                    level = hit & 0xFFFF
                    written = put_level(contexts, symbols, written + 1, context, level, shift)
                    wanted[token_id] = -1
                found[kept], following[kept], heads[level] = token_id, heads[level], kept
                kept += 1
        # Entries that no source gave: gaps between ascending ranks.
        context, rank = LEVEL + LEVEL_CONTEXTS - 1, np.int64(-1)
        if not reading:
            left = 0
            for e in range(offsets[t], offsets[t + 1]):
                if wanted[ids[e]] >= 0:
                    missing[left] = rank_of[ids[e]]
                    left += 1
            missing[:left].sort()
            left = kept  # missing[kept - left] is the next one
        while kept < count:
            bucket = ESCAPE + min((count - kept) >> 1, ESCAPE_CONTEXTS - 1)
            if reading:
                bits, state, at = take_symbol(state, words, at, sums, hints, bucket - LEVEL)
                if bits >= GAP_SYMBOLS:
                    return BAD_ID, 0
                high = min(bits, BITS)
                value, state, at = take_raw(state, words, at, high)
                rest, state, at = take_raw(state, words, at, bits - high)
                rank += (1 << bits) + (value << (bits - high)) + rest
                if rank >= vocab:
                    return BAD_ID, 0
                token_id = order[rank]
                tag = tags[token_id]
                if (tag & np.uint32(0xFFFFFF00)) == stamp and tag & np.uint32(1):
                    return BAD_ID, 0
                level, state, at = take_level(state, words, at, context, shift, sums, hints)
                if level > spread:
                    return BAD_LEVEL, 0
            else:
                gap, bits = np.int64(missing[kept - left]) - rank, 0
                rank += gap
                token_id = order[rank]
                level = wanted[token_id] & 0xFFFF
                wanted[token_id] = -1
                while gap >> (bits + 1):
                    bits += 1
                high, value = min(bits, BITS), gap - (1 << bits)
                contexts[written], symbols[written] = bucket, bits
                contexts[written + 1], symbols[written + 1] = RAW + high, value >> (bits - high)
                contexts[written + 2] = RAW + bits - high
                symbols[written + 2] = value & ((1 << (bits - high)) - 1)
                written = put_level(contexts, symbols, written + 3, context, level, shift)
            found[kept], following[kept], heads[level] = token_id, heads[level], kept
            kept += 1
        if at > len(words):
            return OVERRUN, 0
        e = offsets[t]
        for level in range(spread, -1, -1):
            entry = heads[level]
            heads[level], begin = -1, e
            while entry >= 0:
                ids[e], levels[e] = found[entry], level
                e, entry = e + 1, following[entry]
            if e - begin > 1:
                sort(ids, begin, e)
    if reading and (at != len(words) or state != np.uint32(LOW)):
        return LEFT_OVER, 0
    return 0, written


@njit(cache=True, nogil=True)
def take_level(state, words, at, context, shift, sums, hints):
    low = np.int64(0)
    if shift:
        low, state, at = take_raw(state, words, at, shift)
    level, state, at = take_symbol(state, words, at, sums, hints, context - LEVEL)
    if level >= LEVELS:
        bits = min(level - LEVELS, 12)
        rest, state, at = take_raw(state, words, at, bits)
        level = LEVELS - 1 + (1 << bits) + rest
    return (level << shift) | low, state, at


@njit(cache=True, nogil=True)
def put_level(contexts, symbols, written, context, level, shift):
    if shift:
        contexts[written], symbols[written] = RAW + shift, level & ((1 << shift) - 1)
        written += 1
    symbol, bits, rest = level_symbol(level >> shift)
    contexts[written], symbols[written] = context, symbol
    if symbol < LEVELS:
        return written + 1
    contexts[written + 1], symbols[written + 1] = RAW + bits, rest
    return written + 2


@njit(cache=True, nogil=True)
def tally(order, tokens, offsets, ids, levels, rank_of, seen, most):
    """The ids kept at least `seen` times after each token, at most the `most` most frequent.

    order: positions sorted by token. Returns sizes [V] and, for each listed id by rank within its
    token: id, times kept, mean level, and occurrences of the token.
    """
    vocab = len(rank_of)
    room, at = 0, 0
    while at < len(order):
        entries, end = 0, at
        while end < len(order) and tokens[order[end]] == tokens[order[at]]:
            entries += offsets[order[end] + 1] - offsets[order[end]]
            end += 1
        room, at = room + min(entries // seen, most), end
    sizes = np.zeros(vocab, np.int64)
    listed, times = np.empty(room, np.int32), np.empty(room, np.int32)
    means, of = np.empty(room, np.float32), np.empty(room, np.int32)
    often, total = np.zeros(vocab, np.int64), np.zeros(vocab, np.int64)
    touched = np.empty(vocab, np.int32)
    filled, at = 0, 0
    while at < len(order):
        token, end, different = tokens[order[at]], at, 0
        while end < len(order) and tokens[order[end]] == token:
            for e in range(offsets[order[end]], offsets[order[end] + 1]):
                if often[ids[e]] == 0:
                    touched[different] = ids[e]
                    different += 1
                often[ids[e]] += 1
                total[ids[e]] += levels[e]
            end += 1
        ranked = np.empty(different, np.int64)  # frequent ones, by frequency, then rank
        chosen = 0
        for i in range(different):
            if often[touched[i]] >= seen:
                ranked[chosen] = (-often[touched[i]] << 32) | rank_of[touched[i]]
                chosen += 1
        ranked = np.sort(ranked[:chosen])[:most] & 0xFFFFFFFF
        ranked.sort()
        by_rank = np.empty(len(ranked), np.int32)
        for i in range(different):
            place = np.searchsorted(ranked, rank_of[touched[i]])
            if place < len(ranked) and ranked[place] == rank_of[touched[i]]:
                by_rank[place] = touched[i]
        for token_id in by_rank:
            listed[filled], times[filled] = token_id, often[token_id]
            means[filled], of[filled] = total[token_id] / often[token_id], end - at
            filled += 1
        sizes[token] = len(by_rank)
        for i in range(different):
            often[touched[i]] = 0
            total[touched[i]] = 0
        at = end
    return sizes, listed[:filled], times[:filled], means[:filled], of[:filled]


@njit(cache=True, nogil=True)
def same_entries(counts, roots, ids, others, vocab):
    """Whether each position has the same ids [E] at each of its roots [E], in any order.

    Ids are different within a position of `ids`.
    """
    places, begin = np.zeros(vocab, np.int32), np.int64(0)  # 1 + where `ids` has an id; 0: nowhere
    for position in range(len(counts)):
        end = begin + counts[position]
        for e in range(begin, end):
            if not 0 <= ids[e] < vocab:
                return False
            places[ids[e]] = e + 1
        for e in range(begin, end):
            if not 0 <= others[e] < vocab:
                return False
            place = np.int64(places[others[e]]) - 1
            if place < begin or roots[place] != roots[e]:
                return False
            places[others[e]] = 0  # none of `others` may come twice
        begin = end
    return True
