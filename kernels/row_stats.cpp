// Row statistics, and what traced requests ask, of a few rows on the CPU. The rows' queries are taken layer by layer while
// they are there, and many layers are measured in one call: between two layers of a model nothing of what measures them
// is left in the CPU's caches.
//
// Owns the arithmetic alone, and how the statistics are counted. What each number means stands in glassbox/core/statistics.py, its exact form in
// reference/row_stats.py and reference/row_probe.py; the structs are filled by row_stats_native.py, field by field. Which
// column has what, which number is which type, and what its structs look like, it passes as macros to the compiler:
// GLASSBOX_ROW_COLUMNS, GLASSBOX_STATISTICS, GLASSBOX_TYPES, GLASSBOX_MAX_TOP_K and GLASSBOX_LAYOUT.
//
// A page's keys are widened to float32 and put in the order [head dimension][token] once for all rows and heads that
// read them, unless they lie so. Sums over keys are float32 within CHUNK keys and double beyond.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

extern "C" {

// The row list of a step, and where its requests stand.
struct GlassboxRows {
    const int32_t* rows;         // [num_rows, NUM_ROW_COLUMNS]
    const int32_t* query_start;  // [batch + 1]
    const int32_t* seq_lens;     // [batch]
    const int32_t* block_table;  // [batch, blocks]
    const int64_t* asked;        // [num_rows]: place among the asked rows, or -1; null if nothing is asked
    int64_t num_rows, batch, blocks, block_size;
    int64_t reach;  // a window, or -(size of a chunk); 0 is none
    int64_t sink_tokens, local_window;
};

// Of the items that a row list is cut into (runs of rows of one request): of all of them, and of the largest.
struct GlassboxSizes {
    int64_t scores, item_scores;  // of one head
};

struct GlassboxLayer {
    const void* pages;    // keys of page b, KV head h begin at b * page_stride + h * head_stride
    // [head_size / width, block_size / run]: where a run of keys begins in a page. Its elements (d, t), (d + 1, t), ...
    // of `width` dimensions, then those of the next token. Null if element (d, t) stands at d * block_size + t.
    const int32_t* order;
    const float* slopes;  // [heads] or null
    const float* sinks;   // [heads] or null
    int64_t query_type, key_type, page_stride, head_stride, num_pages;
    int64_t width, run;  // width 1 or 2
    int64_t heads, kv_heads, head_size;
    double scale, soft_cap;  // soft_cap 0 is none
};

// What is asked of A rows in L layers of H heads.
struct GlassboxAsked {
    int64_t layers, top_k, num_spans, sum_keys;  // top_k at most MAX_TOP_K
    const int32_t* spans;     // [A, num_spans, 2]
    const uint8_t* chosen;    // [A, L, H]
    int32_t* topk_positions;  // [A, L, H, top_k], filled with -1
    float* topk_mass;         // likewise, filled with 0
    float* span_mass;         // [A, L, H, num_spans]
    double* chosen_sum;       // [A, sum_keys]
    float* const* kept;       // [A]: null, or [L, H, kept_keys[a]] of the row's last keys, filled with 0
    const int64_t* kept_keys;
    float* const* received;  // [A]: null, or [L, H, position + 1] of the row, filled with 0
};

// Consecutive rows of one request, not decoded, in heads that share a KV head; scored already.
struct GlassboxTile {
    float* scores;         // [heads, rows, columns], raw; they are overwritten
    const float* slopes;   // [heads] or null
    const float* sinks;    // [heads] or null
    const int32_t* spans;  // [num_spans, 2]
    // Of the first row and head; the next row's stand row_stride heads further.
    float* stats;      // [NUM_COLUMNS] each
    float* previous;   // attention to the position before
    float* span_mass;  // [num_spans] each
    double* received;  // of the first head and column, added to; the next head's stand received_stride further
    double* squares;   // likewise, without what rows give themselves; or null
    float* scratch;    // [2, columns]
    int64_t heads, rows, columns, row_stride, received_stride, num_spans;
    int64_t position, base;  // of the first row and of the first column
    int64_t reach, sink_tokens, local_window;
    double soft_cap;
};

// Statistics of rows, and the sums of a worker (glassbox/measure/accumulate.py) that they are added to.
struct GlassboxSums {
    int64_t* counts;          // [layers, places, phases, NUM_STATISTICS, buckets]; a place is a head of an adapter
    double* sums;             // [layers, places, phases, NUM_STATISTICS]
    int64_t* rows;            // [layers, places, phases]
    int64_t* nonfinite;       // likewise
    float* maxima;            // of max_logit: [layers, adapter_heads, phases]
    const float* bounds;      // [NUM_STATISTICS, buckets - 1], ascending
    const int64_t* layers;    // [num_layers]: which they are
    const int64_t* phase_of;  // [num_rows]
    const int64_t* adapters;  // [num_rows], or null: the first one's
    const float* stats;       // [num_layers, num_rows, heads, NUM_COLUMNS]; NaN is no value
    int64_t places, adapter_heads, phases, buckets;
    int64_t num_layers, num_rows, heads;
};

int glassbox_sizes(const GlassboxRows*, GlassboxSizes*);
void glassbox_take(const GlassboxRows*, const GlassboxLayer*, const void* query, int64_t token_stride,
                   int64_t head_stride, float* queries);
int glassbox_row_stats(const GlassboxRows*, const GlassboxLayer* const* layers, int64_t num_layers,
                       const float* queries, const GlassboxAsked*, const int64_t* places, float* stats, float* previous,
                       float* scratch);
void glassbox_prompt_tile(const GlassboxTile*);
void glassbox_add(const GlassboxSums*);
}

namespace {

// Whether a field of C++ is what ctypes has in its place.
template <class T>
constexpr bool is_pointer = std::is_pointer_v<T>;
template <class T>
constexpr bool is_int = std::is_same_v<T, int64_t>;
template <class T>
constexpr bool is_real = std::is_same_v<T, double>;

#define GLASSBOX_STRUCT(Struct, size) \
    static_assert(sizeof(Struct) == size, #Struct " must have the fields that row_stats_native.py gives it");
#define GLASSBOX_FIELD(Struct, field, offset, is_kind)                                    \
    static_assert(offsetof(Struct, field) == offset && is_kind<decltype(Struct::field)>, \
                  #Struct "." #field " must stand where row_stats_native.py has it, as the same type");
GLASSBOX_LAYOUT

enum Type : int64_t { GLASSBOX_TYPES };

// Of the row list (glassbox/core/rows.py), with the bits of a phase.
enum RowColumn : int32_t { GLASSBOX_ROW_COLUMNS };

// Of the statistics of a row and head (glassbox/core/statistics.py), with NONFINITE behind them.
enum Column { GLASSBOX_STATISTICS, NUM_STATISTICS = NONFINITE };

constexpr int64_t CHUNK = 512;
#ifdef __AVX512F__
constexpr int64_t LANES = 32;
#else
constexpr int64_t LANES = 16;
#endif
constexpr int64_t MAX_TOP_K = GLASSBOX_MAX_TOP_K;
constexpr float NAN_F = std::numeric_limits<float>::quiet_NaN();

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct Float32 {
    using Stored = float;
    static float widen(float x) { return x; }
};

struct BFloat16 {
    using Stored = uint16_t;
    static float widen(uint16_t x) { return from_bits(uint32_t(x) << 16); }
};

// Formats with fewer exponent bits: their bits shifted into float32 are the number times a power of two, denormals too.
template <int MAGNITUDE_BITS, int SHIFT, uint32_t FACTOR_BITS, uint32_t SPECIAL, class S>
struct Narrow {
    using Stored = S;
    static float widen(S x) {
        const uint32_t magnitude = x & ((1u << MAGNITUDE_BITS) - 1);
        const uint32_t sign = uint32_t(x >> MAGNITUDE_BITS) << 31;
        const float value = from_bits(magnitude << SHIFT) * from_bits(FACTOR_BITS);
        // Infinity and NaN: keep the mantissa, set the exponent.
        const uint32_t bits = magnitude >= SPECIAL ? (magnitude << SHIFT) | 0x7f800000u : to_bits(value);
        return from_bits(bits | sign);
    }
};

using Float16 = Narrow<15, 13, 0x77800000u, 0x7c00u, uint16_t>;  // 2^112
using E5m2 = Narrow<7, 21, 0x77800000u, 0x7cu, uint8_t>;         // 2^112
using E4m3 = Narrow<7, 20, 0x7b800000u, 0x7fu, uint8_t>;         // 2^120; no infinity

template <class T>
void widen(const void* from, int64_t count, float* to) {
    const auto* stored = static_cast<const typename T::Stored*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = T::widen(stored[i]);
}

// The tokens low .. high - 1 of a page into the order [head dimension][token], where others may be written, too.
template <class T>
void widen_page(const void* from, const GlassboxLayer& layer, int64_t tokens, int64_t low, int64_t high, float* to) {
    const auto* stored = static_cast<const typename T::Stored*>(from);
    const int64_t run = layer.run;
    if (layer.order == nullptr) {
        for (int64_t d = 0; d < layer.head_size; ++d)
            widen<T>(stored + d * tokens + low, high - low, to + d * tokens + low);
        return;
    }
    for (int64_t d = 0; d < layer.head_size; d += layer.width)
        for (int64_t first = low / run * run; first < high; first += run) {
            const auto* source = stored + layer.order[(d / layer.width * tokens + first) / run];
            float* even = to + d * tokens + first;
            if (layer.width == 1) {
                widen<T>(source, run, even);
                continue;
            }
            float* odd = even + tokens;
#pragma omp simd
            for (int64_t t = 0; t < run; ++t) {
                even[t] = T::widen(source[2 * t]);
                odd[t] = T::widen(source[2 * t + 1]);
            }
        }
}

int64_t element_size(int64_t type) { return type == FLOAT32 ? 4 : type == BFLOAT16 || type == FLOAT16 ? 2 : 1; }

const void* element(int64_t type, const void* base, int64_t offset) {
    return static_cast<const char*>(base) + offset * element_size(type);
}

void widen_query(int64_t type, const void* from, int64_t count, float* to) {
    switch (type) {
        case FLOAT32: return widen<Float32>(from, count, to);
        case BFLOAT16: return widen<BFloat16>(from, count, to);
        default: return widen<Float16>(from, count, to);
    }
}

// The page, or `to` with its numbers in order.
const float* ordered_page(const void* page, const GlassboxLayer& layer, int64_t tokens, int64_t low, int64_t high,
                          float* to) {
    if (layer.order == nullptr && layer.key_type == FLOAT32) return static_cast<const float*>(page);
    switch (layer.key_type) {
        case FLOAT32: widen_page<Float32>(page, layer, tokens, low, high, to); break;
        case BFLOAT16: widen_page<BFloat16>(page, layer, tokens, low, high, to); break;
        case FLOAT16: widen_page<Float16>(page, layer, tokens, low, high, to); break;
        case FLOAT8_E4M3FN: widen_page<E4m3>(page, layer, tokens, low, high, to); break;
        default: widen_page<E5m2>(page, layer, tokens, low, high, to);
    }
    return to;
}

// e^x for x <= 0, within 2 ulp; 0 below the smallest normal number. Cephes' polynomial (expf.c, S. Moshier, 1992).
inline float exp_negative(float x) {
    const float k = std::floor(x * 1.44269504088896341f + 0.5f);
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float power = from_bits(uint32_t(int32_t(std::max(k, -126.0f)) + 127) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

// Dot products of HEADS queries [head_size] with WIDTH keys, to scores[head * columns + token].
template <int64_t HEADS, int64_t WIDTH>
inline void score_block(const float* queries, const float* keys, int64_t head_size, int64_t tokens, float* scores,
                        int64_t columns) {
    // Eight vector registers or so: enough multiply-adds are under way at once, and none is spilled.
    float sum[HEADS][WIDTH] = {};
    for (int64_t d = 0; d < head_size; ++d)
        for (int64_t head = 0; head < HEADS; ++head) {
            const float query = queries[head * head_size + d];
#pragma omp simd
            for (int64_t lane = 0; lane < WIDTH; ++lane) sum[head][lane] += query * keys[d * tokens + lane];
        }
    for (int64_t head = 0; head < HEADS; ++head) std::memcpy(scores + head * columns, sum[head], sizeof sum[head]);
}

struct Page {
    const float* keys;  // [head_size][tokens]
    int64_t head_size, tokens;
    int64_t low, high;  // the tokens that are seen
};

template <int64_t HEADS>
void score_heads(const float* queries, const Page& page, float* scores, int64_t columns) {
    constexpr int64_t WIDE = HEADS == 1 ? 4 * LANES : HEADS == 2 ? 2 * LANES : LANES;
    const auto [keys, head_size, tokens, low, high] = page;
    int64_t t = low;
    for (; t + WIDE <= high; t += WIDE)
        score_block<HEADS, WIDE>(queries, keys + t, head_size, tokens, scores + t, columns);
    // The last ones with some that aren't seen, rather than one by one.
    for (; t < high && t + LANES <= tokens; t += LANES)
        score_block<HEADS, LANES>(queries, keys + t, head_size, tokens, scores + t, columns);
    for (; t < high; ++t) score_block<HEADS, 1>(queries, keys + t, head_size, tokens, scores + t, columns);
}

// Dot products of the queries of some heads with the keys of a page.
void score_page(const float* queries, const Page& page, int64_t heads, float* scores, int64_t columns) {
    while (heads > 0) {
        const int64_t some = heads >= 4 && heads != 5 ? 4 : std::min<int64_t>(heads, 3);
        switch (some) {
            case 1: score_heads<1>(queries, page, scores, columns); break;
            case 2: score_heads<2>(queries, page, scores, columns); break;
            case 3: score_heads<3>(queries, page, scores, columns); break;
            default: score_heads<4>(queries, page, scores, columns);
        }
        heads -= some;
        queries += some * page.head_size;
        scores += some * columns;
    }
}

double sum_of(const float* values, int64_t count) {
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += CHUNK) {
        const int64_t end = std::min(begin + CHUNK, count);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t j = begin; j < end; ++j) part += values[j];
        total += part;
    }
    return total;
}

// Sum of the columns first .. end - 1 of a row whose columns begin at position `base` and end before `limit`.
double sum_between(const float* values, int64_t base, int64_t limit, int64_t first, int64_t end) {
    const int64_t low = std::clamp(first, base, limit), high = std::clamp(end, base, limit);
    return high > low ? sum_of(values + (low - base), high - low) : 0.0;
}

struct Row {
    int64_t position, first, prompt_len;
    bool decode;

    Row(const GlassboxRows& of, int64_t number) {
        const int32_t* row = of.rows + number * NUM_ROW_COLUMNS;
        const int64_t query = row[ROW_QUERY], batch = row[ROW_BATCH];
        prompt_len = row[ROW_PROMPT_LEN];
        decode = (row[ROW_PHASE] & ROW_DECODE) != 0;
        if (batch < 0 || batch >= of.batch || query < of.query_start[batch] || query >= of.query_start[batch + 1]) {
            position = first = -1;
            return;
        }
        position = of.seq_lens[batch] - of.query_start[batch + 1] + query;
        first = first_visible(position, of.reach);
    }

    // Of a prompt.
    static Row at(int64_t position, int64_t reach) {
        Row row;
        row.position = position;
        row.first = first_visible(position, reach);
        row.prompt_len = position + 1;
        row.decode = false;
        return row;
    }

    // Whether it is a token of its request.
    bool is_sound() const { return position >= 0; }
    int64_t keys() const { return position + 1 - first; }

   private:
    Row() = default;

    static int64_t first_visible(int64_t position, int64_t reach) {
        return reach == 0 ? 0 : reach > 0 ? std::max<int64_t>(position - reach + 1, 0) : position / -reach * -reach;
    }
};

bool all_finite(const float* scores, int64_t count) {
    float poison = 0;
    // 0 * x is NaN unless x is finite. Four times x, so that differences of scores are finite, too.
#pragma omp simd reduction(+ : poison)
    for (int64_t j = 0; j < count; ++j) poison += scores[j] * 4.0f * 0.0f;
    return poison == 0.0f;
}

// The scores of the visible keys become their weights e^(s - m); the statistics go to out[NUM_COLUMNS].
// Returns the share of one unit of weight in the whole softmax, 1 / Z.
double finish_row(float* scores, const Row& row, double sink, bool has_sink, const GlassboxRows& rows, float* out) {
    const int64_t n = row.keys();
    float most = scores[0];
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < n; ++j) most = std::max(most, scores[j]);
    const double own = scores[n - 1];
    double total = 0, energy = 0, squares = 0, distance = 0;
    for (int64_t begin = 0; begin < n; begin += CHUNK) {
        const int64_t end = std::min(begin + CHUNK, n);
        float weights = 0, energies = 0, squared = 0, offsets = 0;
#pragma omp simd reduction(+ : weights, energies, squared, offsets)
        for (int64_t j = begin; j < end; ++j) {
            const float shifted = scores[j] - most;
            const float weight = exp_negative(shifted);
            scores[j] = weight;
            weights += weight;
            energies += weight * shifted;
            squared += weight * weight;
            offsets += weight * float(int32_t(j - begin));
        }
        total += weights;
        energy += energies;
        squares += squared;
        distance += double(weights) * double(n - 1 - begin) - double(offsets);
    }
    const double log_zk = std::log(total);
    double log_z = log_zk;
    if (has_sink) {
        const double above = sink - double(most);
        const double high = std::max(log_zk, above);
        log_z = high + std::log(std::exp(log_zk - high) + std::exp(above - high));
    }
    const double inverse_z = std::exp(-log_z);
    const int64_t base = row.first, limit = row.position + 1;
    const double entropy = log_zk - energy / total;
    // A statistic that is not computed here has no value.
    std::fill_n(out, NUM_COLUMNS, NAN_F);
    out[ENTROPY_RATIO] = n > 1 ? float(std::clamp(entropy / std::log(double(n)), 0.0, 1.0)) : 0.0f;
    out[EFFECTIVE_KEYS] = float(std::clamp(total * total / squares, 1.0, double(n)));
    out[MAX_LOGIT] = most;
    out[TOP1_RATIO] = float(inverse_z);
    out[SINK_RATIO] = float(std::min(1.0, sum_between(scores, base, limit, 0, rows.sink_tokens) * inverse_z));
    out[LOCAL_RATIO] =
        float(std::min(1.0, sum_between(scores, base, limit, limit - rows.local_window, limit) * inverse_z));
    out[DISTANCE_TOKENS] = float(std::max(0.0, distance / total));
    out[SELF_LOGPROB] = float(std::min(0.0, own - double(most) - log_z));
    if (row.decode) {
        const int64_t num_context = std::clamp<int64_t>(row.prompt_len - base, 0, n);
        const double in_context = sum_between(scores, base, limit, base, base + num_context);
        const double in_answer = sum_between(scores, base, limit, base + num_context, limit);
        const double context = in_context / double(std::max<int64_t>(num_context, 1));
        const double generated = in_answer / double(std::max<int64_t>(n - num_context, 1));
        out[LOOKBACK_RATIO] = float(context / (context + generated));
    }
    out[NONFINITE] = 0.0f;
    return inverse_z;
}

// The k largest of scores[n], largest first, the earlier of equals first; returns how many there are.
int64_t top_of(const float* scores, int64_t n, int64_t k, int32_t* columns) {
    int64_t found = 0;
    if (k <= 0) return found;
    for (int64_t j = 0; j < n; ++j) {
        if (found == k && scores[j] <= scores[columns[k - 1]]) continue;
        int64_t place = found < k ? found++ : k - 1;
        for (; place > 0 && scores[columns[place - 1]] < scores[j]; --place) columns[place] = columns[place - 1];
        columns[place] = int32_t(j);
    }
    return found;
}

struct Answers {
    const GlassboxAsked& asked;
    int64_t row, in_row, at;  // in_row: of layer and head in the row; at: of row, layer and head

    Answers(const GlassboxAsked& asked, int64_t row, int64_t layer, int64_t head, int64_t heads)
        : asked(asked), row(row), in_row(layer * heads + head), at(row * asked.layers * heads + in_row) {}

    void not_finite(const Row& of) const {
        const int64_t limit = of.position + 1;
        for (int64_t s = 0; s < asked.num_spans; ++s) asked.span_mass[at * asked.num_spans + s] = NAN_F;
        if (asked.chosen[at]) std::fill_n(asked.chosen_sum + row * asked.sum_keys, asked.sum_keys, double(NAN_F));
        if (float* kept = asked.kept[row]) {
            const int64_t keys = asked.kept_keys[row];
            std::fill_n(kept + in_row * keys, keys, NAN_F);
        }
        if (float* whole = asked.received[row]) std::fill_n(whole + in_row * limit + of.first, of.keys(), NAN_F);
    }

    void fill(const float* weights, double inverse_z, const Row& of, const int32_t* top, int64_t num_top) const {
        const int64_t base = of.first, limit = of.position + 1;
        for (int64_t i = 0; i < num_top; ++i) {
            asked.topk_positions[at * asked.top_k + i] = int32_t(base + top[i]);
            asked.topk_mass[at * asked.top_k + i] = float(weights[top[i]] * inverse_z);
        }
        for (int64_t s = 0; s < asked.num_spans; ++s) {
            const int32_t* span = asked.spans + (row * asked.num_spans + s) * 2;
            asked.span_mass[at * asked.num_spans + s] =
                float(sum_between(weights, base, limit, span[0], span[1]) * inverse_z);
        }
        if (asked.chosen[at]) {
            double* sum = asked.chosen_sum + row * asked.sum_keys + base;
            for (int64_t j = 0; j < of.keys(); ++j) sum[j] += weights[j] * inverse_z;
        }
        if (float* kept = asked.kept[row]) {
            // The last keys up to the row's own; what a window hides stays 0.
            const int64_t keys = asked.kept_keys[row], here = std::min(keys, of.keys());
            float* last = kept + (in_row + 1) * keys - here;
            for (int64_t j = 0; j < here; ++j) last[j] = float(weights[of.keys() - here + j] * inverse_z);
        }
        if (float* whole = asked.received[row]) {
            float* seen = whole + in_row * limit + base;
            for (int64_t j = 0; j < of.keys(); ++j) seen[j] = float(weights[j] * inverse_z);
        }
    }
};

// Raw scores become those that the softmax sees.
void cap_and_bias(float* scores, int64_t n, const GlassboxLayer& layer, int64_t head) {
    if (layer.soft_cap != 0.0) {
        const float cap = float(layer.soft_cap);
        for (int64_t j = 0; j < n; ++j) scores[j] = cap * std::tanh(scores[j] / cap);
    }
    if (layer.slopes != nullptr) {
        const float slope = layer.slopes[head];
        for (int64_t j = 0; j < n; ++j) scores[j] -= slope * float(int32_t(n - 1 - j));
    }
}

// Consecutive rows of one request, which read the same keys.
class Item {
   public:
    Item(const GlassboxRows& rows, int64_t begin) : rows_(rows), begin_(begin), end_(begin) {
        lowest_ = std::numeric_limits<int64_t>::max();
        const auto batch_of = [&](int64_t number) { return rows.rows[number * NUM_ROW_COLUMNS + ROW_BATCH]; };
        const int32_t batch = batch_of(begin);
        for (; end_ < rows.num_rows && batch_of(end_) == batch; ++end_) {
            const Row row(rows, end_);
            sound_ = sound_ && row.is_sound();
            lowest_ = std::min(lowest_, row.first);
            highest_ = std::max(highest_, row.position);
        }
        const int64_t first_block = std::max<int64_t>(lowest_, 0) / rows.block_size;
        num_blocks_ = highest_ / rows.block_size + 1 - first_block;
        sound_ = sound_ && first_block + num_blocks_ <= rows.blocks;
        block_ids_ = rows.block_table + batch * rows.blocks + first_block;
        base_ = first_block * rows.block_size;
        columns_ = num_blocks_ * rows.block_size;
    }

    bool is_sound() const { return sound_; }
    int64_t end() const { return end_; }
    int64_t num_scores() const { return (end_ - begin_) * columns_; }

    bool blocks_exist(const GlassboxLayer& layer) const {
        return std::all_of(block_ids_, block_ids_ + num_blocks_,
                           [&](int32_t block) { return block >= 0 && block < layer.num_pages; });
    }

    // queries[row of the step][head][dimension] -> scores[row of the item][head][column], column 0 at position base_
    void score(const GlassboxLayer& layer, const float* queries, float* scores, float* page) const {
        const int64_t group = layer.heads / layer.kv_heads, block_size = rows_.block_size;
        for (int64_t block = 0; block < num_blocks_; ++block)
            for (int64_t kv_head = 0; kv_head < layer.kv_heads; ++kv_head) {
                const int64_t from = base_ + block * block_size;
                const auto within = [&](int64_t position) {
                    return std::clamp<int64_t>(position - from, 0, block_size);
                };
                const int64_t at = block_ids_[block] * layer.page_stride + kv_head * layer.head_stride;
                const float* keys = ordered_page(element(layer.key_type, layer.pages, at), layer, block_size,
                                                 within(lowest_), within(highest_ + 1), page);
                for (int64_t number = begin_; number < end_; ++number) {
                    const Row row(rows_, number);
                    const Page seen{keys, layer.head_size, block_size, within(row.first), within(row.position + 1)};
                    const int64_t first_head = kv_head * group;
                    score_page(queries + (number * layer.heads + first_head) * layer.head_size, seen, group,
                               scores + ((number - begin_) * layer.heads + first_head) * columns_ + block * block_size,
                               columns_);
                }
            }
    }

    // previous: of the rows with a slot, their attention to the position before their own; null if there are none.
    void finish(const GlassboxLayer& layer, float* scores, const GlassboxAsked* asked, int64_t place, float* stats,
                float* previous) const {
        for (int64_t r = begin_; r < end_; ++r) {
            const Row row(rows_, r);
            const int64_t number = asked != nullptr && rows_.asked != nullptr ? rows_.asked[r] : -1;
            for (int64_t head = 0; head < layer.heads; ++head) {
                float* seen = scores + ((r - begin_) * layer.heads + head) * columns_ + (row.first - base_);
                float* out = stats + (r * layer.heads + head) * NUM_COLUMNS;
                if (!all_finite(seen, row.keys())) {
                    std::fill_n(out, NUM_COLUMNS, NAN_F);
                    out[NONFINITE] = 1.0f;
                    if (number >= 0) Answers(*asked, number, place, head, layer.heads).not_finite(row);
                    continue;
                }
                cap_and_bias(seen, row.keys(), layer, head);
                int32_t top[MAX_TOP_K];
                const bool wanted = number >= 0;
                const int64_t num_top = wanted ? top_of(seen, row.keys(), asked->top_k, top) : 0;
                const bool has_sink = layer.sinks != nullptr;
                const double inverse_z = finish_row(seen, row, has_sink ? layer.sinks[head] : 0, has_sink, rows_, out);
                if (previous != nullptr && rows_.rows[r * NUM_ROW_COLUMNS + ROW_SLOT] >= 0 && row.position > 0)
                    previous[r * layer.heads + head] =
                        row.keys() > 1 ? float(seen[row.keys() - 2] * inverse_z) : 0.0f;
                if (wanted)
                    Answers(*asked, number, place, head, layer.heads).fill(seen, inverse_z, row, top, num_top);
            }
        }
    }

   private:
    const GlassboxRows& rows_;
    int64_t begin_, end_, lowest_, highest_ = 0;
    bool sound_ = true;
    const int32_t* block_ids_;
    int64_t num_blocks_, base_, columns_;
};

}  // namespace

// Returns 0, or 2 for a row that is no token of its request.
int glassbox_sizes(const GlassboxRows* rows, GlassboxSizes* sizes) {
    *sizes = {0, 0};
    for (int64_t begin = 0; begin < rows->num_rows;) {
        const Item item(*rows, begin);
        if (!item.is_sound()) return 2;
        sizes->scores += item.num_scores();
        sizes->item_scores = std::max(sizes->item_scores, item.num_scores());
        begin = item.end();
    }
    return 0;
}

// The rows' queries, scaled, to queries[rows, heads, head_size]. They come from [tokens, heads, head_size], whose strides
// are in elements and whose last one is 1.
void glassbox_take(const GlassboxRows* rows, const GlassboxLayer* layer, const void* query, int64_t token_stride,
                   int64_t head_stride, float* queries) {
    for (int64_t row = 0; row < rows->num_rows; ++row)
        for (int64_t head = 0; head < layer->heads; ++head, queries += layer->head_size) {
            const int64_t token = rows->rows[row * NUM_ROW_COLUMNS + ROW_QUERY];
            const int64_t at = token * token_stride + head * head_stride;
            widen_query(layer->query_type, element(layer->query_type, query, at), layer->head_size, queries);
            for (int64_t d = 0; d < layer->head_size; ++d) queries[d] *= float(layer->scale);
        }
}

// Layers of one size, whose queries glassbox_take gave one after the other. places: [num_layers], of each in `asked`, or
// -1; `asked` may be null if all are. stats: [num_layers, rows, heads, NUM_COLUMNS]; previous: [num_layers, rows, heads],
// filled with NaN, or null; scratch: a page, and the scores of an item. The rows must be sound. Returns 0, or 1 for a block that a cache doesn't have.
int glassbox_row_stats(const GlassboxRows* rows, const GlassboxLayer* const* layers, int64_t num_layers,
                       const float* queries, const GlassboxAsked* asked, const int64_t* places, float* stats,
                       float* previous, float* scratch) {
    for (int64_t n = 0; n < num_layers; ++n) {
        const GlassboxLayer& layer = *layers[n];
        float* scores = scratch + layer.head_size * rows->block_size;
        for (int64_t begin = 0; begin < rows->num_rows;) {
            const Item item(*rows, begin);
            if (!item.blocks_exist(layer)) return 1;
            item.score(layer, queries, scores, scratch);
            item.finish(layer, scores, places[n] >= 0 ? asked : nullptr, places[n], stats, previous);
            begin = item.end();
        }
        queries += rows->num_rows * layer.heads * layer.head_size;
        stats += rows->num_rows * layer.heads * NUM_COLUMNS;
        if (previous != nullptr) previous += rows->num_rows * layer.heads;
    }
    return 0;
}

void glassbox_prompt_tile(const GlassboxTile* tile) {
    GlassboxRows rows{};
    rows.sink_tokens = tile->sink_tokens, rows.local_window = tile->local_window;
    GlassboxLayer layer{};
    layer.slopes = tile->slopes, layer.soft_cap = tile->soft_cap;
    for (int64_t head = 0; head < tile->heads; ++head) {
        std::fill_n(tile->scratch, 2 * tile->columns, 0.0f);
        for (int64_t r = 0; r < tile->rows; ++r) {
            const Row row = Row::at(tile->position + r, tile->reach);
            const int64_t n = row.keys(), at = r * tile->row_stride + head, column = row.first - tile->base;
            float* seen = tile->scores + (head * tile->rows + r) * tile->columns + column;
            float* out = tile->stats + at * NUM_COLUMNS;
            float* masses = tile->span_mass + at * tile->num_spans;
            float *sums = tile->scratch + column, *squares = sums + tile->columns;
            if (!all_finite(seen, n)) {
                std::fill_n(out, NUM_COLUMNS, NAN_F);
                out[NONFINITE] = 1.0f;
                tile->previous[at] = NAN_F;
                std::fill_n(masses, tile->num_spans, NAN_F);
                std::fill_n(sums, n, NAN_F);
                std::fill_n(squares, n - 1, NAN_F);
                continue;
            }
            cap_and_bias(seen, n, layer, head);
            const bool has_sink = tile->sinks != nullptr;
            const double inverse_z = finish_row(seen, row, has_sink ? tile->sinks[head] : 0, has_sink, rows, out);
            tile->previous[at] = row.position == 0 ? NAN_F : n > 1 ? float(seen[n - 2] * inverse_z) : 0.0f;
            for (int64_t s = 0; s < tile->num_spans; ++s)
                masses[s] = float(sum_between(seen, row.first, row.position + 1, tile->spans[2 * s],
                                              tile->spans[2 * s + 1]) * inverse_z);
            const float share = float(inverse_z);
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) sums[j] += seen[j] * share;
            if (tile->squares == nullptr) continue;
#pragma omp simd
            for (int64_t j = 0; j < n - 1; ++j) squares[j] += (seen[j] * share) * (seen[j] * share);
        }
        double* received = tile->received + head * tile->received_stride;
        for (int64_t j = 0; j < tile->columns; ++j) received[j] += tile->scratch[j];
        if (tile->squares == nullptr) continue;
        double* squares = tile->squares + head * tile->received_stride;
        for (int64_t j = 0; j < tile->columns; ++j) squares[j] += tile->scratch[tile->columns + j];
    }
}

void glassbox_add(const GlassboxSums* to) {
    const int64_t num_bounds = to->buckets - 1;
    const float* stats = to->stats;
    for (int64_t n = 0; n < to->num_layers; ++n)
        for (int64_t r = 0; r < to->num_rows; ++r) {
            const int64_t first = (to->adapters == nullptr ? 0 : to->adapters[r]) * to->adapter_heads;
            for (int64_t head = 0; head < to->heads; ++head, stats += NUM_COLUMNS) {
                const int64_t cell =
                    (to->layers[n] * to->places + first + head) * to->phases + to->phase_of[r];
                to->rows[cell] += 1;
                to->nonfinite[cell] += int64_t(stats[NONFINITE]);
                for (int64_t s = 0; s < NUM_STATISTICS; ++s) {
                    const float value = stats[s];
                    if (std::isnan(value)) continue;
                    // The first bound that is no smaller; values beyond the last one have a bucket of their own.
                    const float* bounds = to->bounds + s * num_bounds;
                    int64_t bucket = 0;
                    while (bucket < num_bounds && bounds[bucket] < value) ++bucket;
                    to->counts[(cell * NUM_STATISTICS + s) * to->buckets + bucket] += 1;
                    to->sums[cell * NUM_STATISTICS + s] += value;
                }
                float& most = to->maxima[(to->layers[n] * to->adapter_heads + head) * to->phases + to->phase_of[r]];
                if (stats[MAX_LOGIT] > most) most = stats[MAX_LOGIT];
            }
        }
}
