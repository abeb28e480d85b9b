"""The compiled part of version 3: it writes and reads the entries of a row.

At each position the number of entries and the smallest root come first. Then *candidates* are
asked whether they are kept: the usual successors of the current token, the ids kept at the longest
earlier match, the ids kept at the position before. Other entries are written as gaps between
frequency ranks. Then come the levels, roots above the smallest one, and the tail, which the roots
nearly say. Writer and reader share `ask` and `settle`, so both see the same contexts.

The writer lists contexts and symbols. The reader takes them from STREAMS interleaved rANS states
(Giesen, arXiv 1402.3392) with 16-bit words and probabilities in 1/32768: symbol i is of state
i mod STREAMS, so that their long operations overlap. All arithmetic is on integers, or is exact.

This is one file because numba keeps compiled functions on disk, and makes them again where their
own file has changed, but not where one that they call has.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from storage.codec.root_grid import FAINTEST, FINE
from storage.codec.v2_kernels import matches, tally

__all__ = ["matches", "tally"]

BITS = 15  # bits of a probability
ONE = 1 << BITS
LOW = 1 << 16  # a state's lower bound
STREAMS = 4
DIRECT = 32  # numbers with a symbol of their own; larger ones have four symbols for each doubling
SYMBOLS = 104
HINT_BITS = 7
BINS = 64  # levels that are sorted by counting
MOST_LISTED = 192  # successors of one token

# Contexts of flags ("is the candidate kept?")
KINDS = 32 + 6  # how likely a listed id is kept (8) and at which level (4); or the class of a rank
EARLIER = 6  # at the match: not there, or the class of its root
MATCHED = EARLIER * 3 + 1  # the same with the length of the match; the last one: no match
SINCE = 6  # when the id was last kept in this row, and whether its root was large
SCALES = 8  # class of the number of entries and the smallest root
FLAGS = KINDS * MATCHED * SINCE * SCALES
# Contexts of numbers
COUNT = FLAGS  # entries of a position
FLOOR = COUNT + 1  # its smallest root, by the bit length of the count
TAIL = FLOOR + 8  # none, small or large, by the bit length of the root that it should have
ROOT = TAIL + 8  # a large tail
LOG = ROOT + 8  # a small tail
GAP = LOG + 8  # between ranks, by the number of entries still to come
LEVEL = GAP + 8  # by usual level (8, or not listed, or no candidate), the match and the scale
USUAL = 10
RAW = LEVEL + USUAL * EARLIER * SCALES  # RAW + n: n plain bits
NUMBERS = RAW - FLAGS
GROUPS = (COUNT, FLOOR, TAIL, ROOT, LOG, GAP, LEVEL, RAW)

LOWER, ASKED = (1 << 32) - 1, 1 << 32  # parts of a note, see Asked
NEXT = np.uint64(1)  # unsigned indices save the check for negative ones
NONE, SMALL, LARGE = 0, 1, 2  # kinds of tails
OVERRUN, TOO_MANY, BAD_ID, BAD_ROOT, LEFT_OVER = 1, 2, 3, 4, 5  # of reading, see v3.FAILURES


class Known(NamedTuple):
    """The tables, see v3_tables.Tables, and what follows from them."""

    order: npt.NDArray[np.uint32]  # id of each rank [V]
    rank_of: npt.NDArray[np.uint32]  # [V]
    rank_kinds: npt.NDArray[np.uint8]  # class of each id's rank [V]
    starts: npt.NDArray[np.uint32]
    listed: npt.NDArray[np.uint32]
    kinds: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.int64]  # edges of SCALES classes
    roots: npt.NDArray[np.int64]  # edges of EARLIER - 1 classes
    chances: npt.NDArray[np.uint16]
    sums: npt.NDArray[np.uint16]
    hints: npt.NDArray[np.uint8]


class Asked(NamedTuple):
    """The candidates of one position, and what is known of ids in this row.

    A note of an id has two halves. The lower one is 2 (position + 1) + whether its root was large,
    of the last position that kept it; 0 for none. The upper one is 16 (position + 1) + 2 EARLIER +
    whether it was asked, of a position that asks it or has it at its match.
    """

    ids: npt.NDArray[np.uint32]
    kinds: npt.NDArray[np.uint32]
    seen: npt.NDArray[np.int64]  # their notes before they were asked
    flags: npt.NDArray[np.uint32]  # context of "kept?"
    notes: npt.NDArray[np.int64]  # of each id [V]


@njit(cache=True, nogil=True)
def bit_length(value):
    bits = 0
    while value >> bits:
        bits += 1
    return bits


@njit(cache=True, nogil=True)
def work(most):
    """Numbers of one position's entries or candidates."""
    return np.zeros(MOST_LISTED + 2 * most + 1, np.uint32)


@njit(cache=True, nogil=True)
def new_asked(vocab, most):
    seen, notes = np.zeros(MOST_LISTED + 2 * most + 1, np.int64), np.zeros(vocab, np.int64)
    return Asked(work(most), work(most), seen, work(most), notes)


@njit(cache=True, nogil=True)
def scale_of(known, count, floor):
    """Class of a position: few entries first, then those with many and small roots."""
    key, scale = (count << 16) + floor, 0
    for edge in known.scales:
        scale += key >= edge
    return scale


@njit(cache=True, nogil=True)
def ask(known, asked, t, token, scale, ids, classes, match, length, before):
    """List the candidates of position t, each id once; returns how many.

    match, before: (begin, end) of the entries of the match and of the position before.
    """
    notes, stamp, n = asked.notes, (t + 1) << 36, 0
    for e in range(match[0], match[1]):
        notes[ids[e]] = (notes[ids[e]] & LOWER) | stamp | ((1 + np.int64(classes[e])) << 33)
    for e in range(known.starts[token], known.starts[token + 1]):
        token_id = known.listed[e]
        note = notes[token_id]
        note = max(note, stamp | (note & LOWER))
        notes[token_id] = note | ASKED
        asked.ids[n], asked.kinds[n], asked.seen[n] = token_id, known.kinds[e] >> 1, note
        n += 1
    for begin, end in (match, before):
        for e in range(begin, end):
            token_id = ids[e]
            note = notes[token_id]
            note = max(note, stamp | (note & LOWER))
            notes[token_id] = note | ASKED
            asked.ids[n], asked.kinds[n] = token_id, 32 + known.rank_kinds[token_id]
            asked.seen[n] = note
            n += (note & ASKED) == 0
    nowhere = match[1] == match[0]
    matched = MATCHED - 1 if nowhere else (length > 1) + (length > 3)
    flag_contexts(asked, n, t, matched, scale)
    return n


@njit(cache=True, nogil=True)
def flag_contexts(asked, n, t, matched, scale):
    """Fill asked.flags; without branches, so that it is compiled to vectors."""
    for i in range(n):
        note = asked.seen[i]
        last = note & LOWER
        gap = t + 1 - (last >> 1)
        since = 3 + (gap > 4) + (gap > 29) - (gap <= 1) * (2 - (last & 1))
        kind = asked.kinds[i] * MATCHED + matched + 3 * ((note >> 33) & 7)
        asked.flags[i] = (kind * SINCE + (last != 0) * since) * SCALES + scale


@njit(cache=True, nogil=True)
def usual(known, asked, token, scale, found, kept, which, contexts):
    """Contexts of the levels of kept candidates: `which` says the number of each."""
    start = np.int64(known.starts[token])
    listed = np.int64(known.starts[token + 1]) - start
    for i in range(kept):
        kind = np.int64(known.kinds[start + which[i]] & 7) if which[i] < listed else 8
        earlier = (asked.seen[which[i]] >> 33) & 7
        contexts[i] = LEVEL + (kind * EARLIER + earlier) * SCALES + scale


@njit(cache=True, nogil=True)
def settle(known, asked, t, floor, found, levels, count, ids, roots, classes, begin, bins):
    """Put the entries of a position in order: by descending root, equal ones as they came.

    Sorts by counting, but for large levels, which are few. bins: BINS zeros. Returns the sum of
    squares of the roots.
    """
    for i in range(count):
        bins[min(levels[i], BINS - 1)] += 1
    large = np.int64(bins[BINS - 1])
    e = begin
    for level in range(BINS - 1, -1, -1):
        size, bins[level] = bins[level], e
        e += size
    edges, total = known.roots, np.int64(0)
    for i in range(count):
        e = bins[min(levels[i], BINS - 1)]
        bins[min(levels[i], BINS - 1)] = e + 1
        root = floor + np.int64(levels[i])
        kind = (root >= edges[0]) + (root >= edges[1]) + (root >= edges[2]) + (root >= edges[3])
        ids[e], roots[e], classes[e] = found[i], root, kind
        asked.notes[found[i]] = ((t + 1) << 1) | (kind >= 3)
        total += root * root
    bins[:] = 0
    for e in range(begin + 1, begin + large):
        root, token_id, kind, at = roots[e], ids[e], classes[e], e
        while at > begin and roots[at - 1] < root:
            roots[at], ids[at], classes[at] = roots[at - 1], ids[at - 1], classes[at - 1]
            at -= 1
        roots[at], ids[at], classes[at] = root, token_id, kind
    return total


@njit(cache=True, nogil=True)
def expected_tail(total, one):
    """The root that a tail should have: what the roots leave of `one`, the root of 1."""
    left = one * one - total
    return np.int64(np.sqrt(np.float64(left))) if left > 0 else np.int64(0)  # exact: under 2^52


# Writing


@njit(cache=True, nogil=True)
def put(contexts, symbols, n, context, value):
    """List a number."""
    if value < DIRECT:
        contexts[n], symbols[n] = context, value
        return n + 1
    bits = bit_length(value) - 3
    contexts[n], symbols[n] = context, DIRECT + 4 * (bits - 3) + ((value >> bits) & 3)
    high = max(bits - BITS, 0)
    if high:
        n += 1
        contexts[n], symbols[n] = RAW + high, (value >> BITS) & ((1 << high) - 1)
        bits = BITS
    contexts[n + 1], symbols[n + 1] = RAW + bits, value & ((1 << bits) - 1)
    return n + 2


@njit(cache=True, nogil=True)
def put_tail(contexts, symbols, n, tail, expected):
    context = min(bit_length(expected), 7)
    if tail == 0:
        return put(contexts, symbols, n, TAIL + context, NONE)
    if tail < 0:
        n = put(contexts, symbols, n, TAIL + context, SMALL)
        return put(contexts, symbols, n, LOG + context, -1 - tail)
    n = put(contexts, symbols, n, TAIL + context, LARGE)
    more = tail - expected
    return put(contexts, symbols, n, ROOT + context, 2 * more if more >= 0 else -2 * more - 1)


@njit(cache=True, nogil=True)
def put_ids(asked, n, candidates, wanted, count, found, which, levels, contexts, symbols):
    """List which candidates are kept -> (symbols listed, ids kept); stops after `count`.

    wanted [V]: 1 + level of each id of the position; 0 once it is listed.
    """
    kept = asked_of = 0
    for i in range(candidates):
        if kept == count:
            break
        token_id = asked.ids[i]
        hit = wanted[token_id]
        contexts[n + i], symbols[n + i] = asked.flags[i], hit == 0
        # No branch: a third of the guesses of the processor would be wrong.
        found[kept], levels[kept], which[kept] = token_id, hit - 1, i
        wanted[token_id] = 0
        kept += hit != 0
        asked_of = i + 1
    return n + asked_of, kept


@njit(cache=True, nogil=True)
def put_gaps(
    known, n, kept, count, missing, wanted, scale, found, levels, kinds, contexts, symbols
):
    """List the ids that were no candidates, by ascending rank -> symbols listed."""
    rank = np.int64(-1)
    missing.sort()
    for i in range(len(missing)):
        n = put(contexts, symbols, n, GAP + min((count - kept) >> 1, 7), missing[i] - rank - 1)
        rank = missing[i]
        token_id = known.order[rank]
        found[kept], levels[kept] = token_id, wanted[token_id] - 1
        kinds[kept] = LEVEL + 9 * EARLIER * SCALES + scale
        wanted[token_id] = 0
        kept += 1
    return n


@njit(cache=True, nogil=True)
def list_row(known, tokens, place, length, offsets, ids, roots, tails, one, contexts, symbols):
    """List contexts and symbols of a row -> how many.

    tokens, place, length [P]: its tokens and matches; offsets [P + 1]; ids, roots [E] are put in
    the reader's order; tails [P]; one: the root of 1.
    """
    most = np.int64(0)
    for t in range(len(tokens)):
        most = max(most, offsets[t + 1] - offsets[t])
    asked = new_asked(len(known.order), most)
    wanted = np.zeros(len(known.order), np.int32)
    classes = np.zeros(len(ids), np.uint8)
    bins = np.zeros(BINS, np.int64)
    found, levels, kinds, which = work(most), work(most), work(most), work(most)
    missing = np.zeros(most, np.int64)
    n = 0
    for t in range(len(tokens)):
        begin, end = offsets[t], offsets[t + 1]
        count = end - begin
        n = put(contexts, symbols, n, COUNT, count)
        total = np.int64(0)
        if count:
            floor = np.int64(roots[end - 1])
            n = put(contexts, symbols, n, FLOOR + min(bit_length(count), 7), floor)
            scale = scale_of(known, count, floor)
            match = (offsets[place[t]], offsets[place[t] + 1]) if place[t] >= 0 else (begin, begin)
            before = (offsets[t - 1], begin) if t else (begin, begin)
            candidates = ask(
                known, asked, t, tokens[t], scale, ids, classes, match, length[t], before
            )
            for e in range(begin, end):
                wanted[ids[e]] = 1 + roots[e] - floor
            n, kept = put_ids(
                asked, n, candidates, wanted, count, found, which, levels, contexts, symbols
            )
            usual(known, asked, tokens[t], scale, found, kept, which, kinds)
            left = 0
            for e in range(begin, end):
                missing[left] = known.rank_of[ids[e]]
                left += wanted[ids[e]] != 0
            n = put_gaps(
                known, n, kept, count, missing[:left], wanted, scale, found, levels, kinds,
                contexts, symbols,
            )  # fmt: skip
            for i in range(count):
                n = put(contexts, symbols, n, kinds[i], levels[i])
            total = settle(
                known, asked, t, floor, found, levels, count, ids, roots, classes, begin, bins
            )
        n = put_tail(contexts, symbols, n, tails[t], expected_tail(total, one))
    return n


@njit(cache=True, nogil=True)
def count(contexts, symbols, flags, tables):
    """Count each symbol in its context: flags [FLAGS, 2], tables [NUMBERS, SYMBOLS]."""
    for i in range(len(contexts)):
        if contexts[i] < FLAGS:
            flags[contexts[i], symbols[i]] += 1
        elif contexts[i] < RAW:
            tables[contexts[i] - FLAGS, symbols[i]] += 1


@njit(cache=True, nogil=True)
def compress(contexts, symbols, chances, sums):
    """Code the symbols from last to first -> uint16 words in reading order."""
    words = np.empty(len(symbols) + 2 * STREAMS, np.uint16)
    states, at = np.full(STREAMS, LOW, np.int64), len(words)
    for i in range(len(symbols) - 1, -1, -1):
        context, symbol = contexts[i], np.int64(symbols[i])
        if context < FLAGS:
            chance = np.int64(chances[context])
            start = chance * symbol
            width = ONE - chance if symbol else chance
        elif context < RAW:
            start = np.int64(sums[context - FLAGS, symbol])
            width = np.int64(sums[context - FLAGS, symbol + 1]) - start
        else:
            bits = BITS - (context - RAW)
            start, width = symbol << bits, np.int64(1) << bits
        state = states[i & (STREAMS - 1)]
        if state >= width << (32 - BITS):
            at -= 1
            words[at] = state & 0xFFFF
            state >>= 16
        rounds = np.int64(np.uint32(state) // np.uint32(width))
        states[i & (STREAMS - 1)] = state + rounds * (ONE - width) + start
    for stream in range(STREAMS - 1, -1, -1):
        at -= 2
        words[at], words[at + 1] = states[stream] >> 16, states[stream] & 0xFFFF
    return words[at:].copy()


# Reading


class Stream(NamedTuple):
    """A row's coded symbols. place: the next word, the state whose turn it is."""

    words: npt.NDArray[np.uint16]  # with zeros behind them for all that one position may take
    states: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]


@njit(cache=True, nogil=True)
def open_stream(words, room):
    """The states are the first words; `room` zeros follow the last one."""
    padded = np.zeros(len(words) + room, np.uint16)
    padded[: len(words)] = words
    states = np.empty(STREAMS, np.int64)
    for stream in range(STREAMS):
        states[stream] = (np.int64(words[2 * stream]) << 16) | np.int64(words[2 * stream + 1])
    place = np.zeros(2, np.int64)
    place[0] = 2 * STREAMS
    return Stream(padded, states, place)


@njit(cache=True, nogil=True)
def refill(state, words, at):
    """Take a word if the state is low."""
    if state < LOW:
        return (state << 16) | np.int64(words[np.uint64(at)]), at + 1
    return state, at


@njit(cache=True, nogil=True)
def plain(state, words, at, bits):
    """Decode plain bits -> (their value, state, at)."""
    shift = BITS - bits
    value = (state & (ONE - 1)) >> shift
    state = ((state >> BITS) << shift) + (state & ((1 << shift) - 1))
    state, at = refill(state, words, at)
    return value, state, at


@njit(cache=True, nogil=True)
def decode(state, words, at, sums, hints, row):
    """Decode a symbol of the distribution sums[row] -> (symbol, state, at)."""
    low = state & (ONE - 1)
    which, symbol = (
        np.uint64(row),
        np.uint64(hints[np.uint64(row), np.uint64(low >> (BITS - HINT_BITS))]),
    )
    symbol += np.uint64(sums[which, symbol + NEXT] <= low)  # mostly found so, without a branch
    symbol += np.uint64(sums[which, symbol + NEXT] <= low)
    while sums[which, symbol + NEXT] <= low:
        symbol += NEXT
    start = np.int64(sums[which, symbol])
    state = (np.int64(sums[which, symbol + NEXT]) - start) * (state >> BITS) + low - start
    state, at = refill(state, words, at)
    return np.int64(symbol), state, at


@njit(cache=True, nogil=True)
def take_plain(stream, bits):
    """Take plain bits."""
    at, i = stream.place[0], stream.place[1] & (STREAMS - 1)
    value, stream.states[i], at = plain(stream.states[i], stream.words, at, bits)
    stream.place[0], stream.place[1] = at, i + 1
    return value


@njit(cache=True, nogil=True)
def take(stream, known, context):
    """Take a number."""
    at, i = stream.place[0], stream.place[1] & (STREAMS - 1)
    symbol, stream.states[i], at = decode(
        stream.states[i], stream.words, at, known.sums, known.hints, context - FLAGS
    )
    stream.place[0], stream.place[1] = at, i + 1
    return symbol if symbol < DIRECT else take_rest(stream, symbol)


@njit(cache=True, nogil=True)
def take_rest(stream, symbol):
    """Take the lower bits of a number, whose symbol says their number and the bits before."""
    bits = 3 + ((symbol - DIRECT) >> 2)
    value = 4 + ((symbol - DIRECT) & 3)
    if bits > BITS:
        value = (value << (bits - BITS)) | take_plain(stream, bits - BITS)
        bits = BITS
    return (value << bits) | take_plain(stream, bits)


@njit(cache=True, nogil=True)
def take_levels(stream, known, contexts, count, levels):
    """Take a number in each context; as `take`, with the states in registers."""
    words, states, sums, hints = stream.words, stream.states, known.sums, known.hints
    done = 0
    while done < count:
        at, i = stream.place[0], stream.place[1]
        one, two = states[i & 3], states[(i + 1) & 3]
        three, four = states[(i + 2) & 3], states[(i + 3) & 3]
        symbol, begin = np.int64(0), done
        while done < count and symbol < DIRECT:
            symbol, one, at = decode(one, words, at, sums, hints, contexts[done] - FLAGS)
            levels[done] = symbol
            done += 1
            one, two, three, four = two, three, four, one  # the states take turns
        i += done - begin
        states[i & 3], states[(i + 1) & 3] = one, two
        states[(i + 2) & 3], states[(i + 3) & 3] = three, four
        stream.place[0], stream.place[1] = at, i & 3
        if symbol >= DIRECT:
            levels[done - 1] = take_rest(stream, symbol)


@njit(cache=True, nogil=True)
def take_ids(known, asked, stream, candidates, count, found, which):
    """Read which candidates are kept -> how many; stops after `count`."""
    words, states, kept, c = stream.words, stream.states, 0, 0
    at, i = stream.place[0], stream.place[1]
    one, two = states[i & 3], states[(i + 1) & 3]
    three, four = states[(i + 2) & 3], states[(i + 3) & 3]
    while c < candidates and kept < count:
        chance = np.int64(known.chances[asked.flags[np.uint64(c)]])
        low = one & (ONE - 1)
        found[np.uint64(kept)], which[np.uint64(kept)] = asked.ids[np.uint64(c)], c
        hit = np.int64(low < chance)
        kept += hit
        # No branch: a third of the guesses of the processor would be wrong.
        one = (one >> BITS) * (ONE - chance + hit * (2 * chance - ONE)) + low - chance * (1 - hit)
        one, at = refill(one, words, at)
        one, two, three, four = two, three, four, one  # the states take turns
        c += 1
    i += c
    states[i & 3], states[(i + 1) & 3] = one, two
    states[(i + 2) & 3], states[(i + 3) & 3] = three, four
    stream.place[0], stream.place[1] = at, i & 3
    return kept


@njit(cache=True, nogil=True)
def take_gaps(known, asked, stream, t, kept, count, scale, found, kinds):
    """Read the ids that were no candidates -> whether they are ids, and no candidates."""
    rank, stamp = np.int64(-1), (t + 1) << 36
    while kept < count:
        rank += 1 + take(stream, known, GAP + min((count - kept) >> 1, 7))
        if rank >= len(known.order):
            return False
        token_id = known.order[rank]
        if asked.notes[token_id] >= stamp and asked.notes[token_id] & ASKED:
            return False
        found[kept], kinds[kept] = token_id, LEVEL + 9 * EARLIER * SCALES + scale
        kept += 1
    return True


@njit(cache=True, nogil=True)
def take_tail(stream, known, expected, one):
    """Read a tail -> its number, or one + 1 for an impossible one."""
    context = min(bit_length(expected), 7)
    kind = take(stream, known, TAIL + context)
    if kind == NONE:
        return np.int64(0)
    if kind == SMALL:
        level = take(stream, known, LOG + context)
        return -1 - level if level < FAINTEST else one + 1
    if kind != LARGE:
        return one + 1
    value = take(stream, known, ROOT + context)
    tail = expected + (-((value + 1) >> 1) if value & 1 else value >> 1)
    return tail if FINE <= tail <= one else one + 1


@njit(cache=True, nogil=True)
def read_row(known, tokens, place, length, words, one, most, counts, ids, roots, tails):
    """Read a row into counts, tails [P] and ids, roots [E] -> (0 or what is wrong, entries).

    most: entries of a position at most.
    """
    if len(words) < 2 * STREAMS:
        return OVERRUN, 0
    asked = new_asked(len(known.order), most)
    stream = open_stream(words, MOST_LISTED + 8 * most + 64)
    offsets = np.zeros(len(tokens) + 1, np.int64)
    classes = np.zeros(len(ids), np.uint8)
    bins = np.zeros(BINS, np.int64)
    found, levels, kinds, which = work(most), work(most), work(most), work(most)
    for t in range(len(tokens)):
        begin = offsets[t]
        count = take(stream, known, COUNT)
        if count > most or begin + count > len(ids):
            return TOO_MANY, 0
        counts[t] = count
        offsets[t + 1] = begin + count
        total = np.int64(0)
        if count:
            floor = take(stream, known, FLOOR + min(bit_length(count), 7))
            scale = scale_of(known, count, floor)
            match = (offsets[place[t]], offsets[place[t] + 1]) if place[t] >= 0 else (begin, begin)
            before = (offsets[t - 1], begin) if t else (begin, begin)
            candidates = ask(
                known, asked, t, tokens[t], scale, ids, classes, match, length[t], before
            )
            kept = take_ids(known, asked, stream, candidates, count, found, which)
            usual(known, asked, tokens[t], scale, found, kept, which, kinds)
            if not take_gaps(known, asked, stream, t, kept, count, scale, found, kinds):
                return BAD_ID, 0
            take_levels(stream, known, kinds, count, levels)
            if floor + levels[:count].max() > one:
                return BAD_ROOT, 0
            total = settle(
                known, asked, t, floor, found, levels, count, ids, roots, classes, begin, bins
            )
        tail = take_tail(stream, known, expected_tail(total, one), one)
        if tail > one:
            return BAD_ROOT, 0
        tails[t] = tail
        if stream.place[0] > len(words):
            return OVERRUN, 0
    if stream.place[0] != len(words) or (stream.states != LOW).any():
        return LEFT_OVER, 0
    return 0, offsets[len(tokens)]
