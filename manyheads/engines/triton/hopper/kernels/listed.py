"""Which pairs are listed where blocks are no tiles: a bit for each query block and key block says so, see uniting.py.
Without `bits` all are. Words are of 32 query blocks, or of 32 key blocks where these are FEW keys and less."""

from __future__ import annotations

from manyheads.engines.triton.hopper.names import gl, gluon

FEW = gl.constexpr(8)


@gluon.jit
def words_of(q_len, q_start, kv_len, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr):
    """How many a head has."""
    chunks = ((q_len + 127) // 128 * 128 - 1 + q_start % QUERY_BLOCK) // (32 * QUERY_BLOCK) + 1
    if KEY_BLOCK <= FEW:
        return chunks.to(gl.int64) * 32 * ((kv_len + 32 * KEY_BLOCK - 1) // (32 * KEY_BLOCK))
    else:
        return chunks.to(gl.int64) * ((kv_len + KEY_BLOCK - 1) // KEY_BLOCK)


@gluon.jit
def listed_of(
    bits, places, row, key, q_start, kv_len, KEYS: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr
):
    """What pairs_of reads of the queries at row + places and the KEYS keys from `key` on, int32. 32 queries have one
    word: row, and the first query's place in its block, are multiples of 32. To be asked for early, as it is loaded."""
    if bits is None:
        return places
    elif KEY_BLOCK <= FEW:
        words = (kv_len + 32 * KEY_BLOCK - 1) // (32 * KEY_BLOCK)
        own = bits + gl.minimum(key // (32 * KEY_BLOCK), words - 1)
        found = gl.load(own + (row + q_start % QUERY_BLOCK + places) // QUERY_BLOCK * words)
        return found >> (key // KEY_BLOCK % 32)
    else:
        first = row + q_start % QUERY_BLOCK
        blocks = (kv_len + KEY_BLOCK - 1) // KEY_BLOCK
        found = places * 0
        for part in gl.static_range(KEYS // KEY_BLOCK if KEYS > KEY_BLOCK else 1):
            column = bits + gl.minimum(key // KEY_BLOCK + part, blocks - 1)
            words = places * 0 + gl.load(column + first // (32 * QUERY_BLOCK) * blocks)
            for group in gl.static_range(1, places.shape[0] // 32):
                other = gl.load(column + (first + 32 * group) // (32 * QUERY_BLOCK) * blocks)
                words = gl.where(places >= 32 * group, other, words)
            if KEYS > KEY_BLOCK:  # a bit for each block of keys
                words = ((words >> ((first + places) // QUERY_BLOCK % 32)) & 1) << part
            found = found | words
        return found


@gluon.jit
def pairs_of(
    inside, listed, queries, keys, row, q_start, KEYS: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr
):
    """Of the pairs `inside` those that are listed; queries and keys are their places behind `row` and `key`."""
    if KEY_BLOCK == 0:
        return inside
    else:
        if KEYS > KEY_BLOCK:
            bit = keys // KEY_BLOCK
        else:
            bit = (row + q_start % QUERY_BLOCK + queries) // QUERY_BLOCK % 32
        return inside & (((listed >> bit) & 1) != 0)
