// The loops of lowered graphs for CPUs with AVX-512 and its 8-bit products (VNNI).
//
// A plan is a list of steps over numbered buffers. Everything that depends on shapes was decided when the plan was
// made; run() walks the list in one parallel region, with a barrier behind every step. Images lie with their channels
// side by side (N, H, W, C).
//
// Products: a tile of MR pixels times NB x 16 output channels stays in registers; each instruction multiplies four
// input channels of a pixel with those of 16 output channels (vpdpbusd). Where the pixels of a window lie is looked up
// in two tables, one of rows and one of columns, so that every stride, dilation and padding is the same loop (the idea
// is that of XNNPACK's indirection buffers; Dukhan, The Indirect Convolution Algorithm, 2019).

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#define UNROLL _Pragma("GCC unroll 64")
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t OUTSIDE = -(int64_t(1) << 40);  // a row or column in the padding; a sum with it is below zero
constexpr int MAX_PLACES = 1024;  // of a window

enum Kind : int64_t { FLOAT = 0, BYTES = 1 };
enum Activation : int64_t { NONE = 0, CLAMP, HARDSWISH, SILU, GELU, GELU_TANH, LEAKY, TANH, SIGMOID, HARDSIGMOID };

// Part of a buffer. Byte offset of the first number, bytes from one pixel to the next and from one image to the next.
struct Place {
    int64_t buffer, offset, pixel, image;
};

// What happens to sums of products: y = sum * scale + bias (+ residual * residual_scale + residual_shift), the
// activation, and for bytes y * inverse + zero, rounded to even and clipped to low..high.
struct Finish {
    const float* scale;  // of each output channel, in whole vectors
    const float* bias;
    int64_t kind;  // of the result
    int64_t activation;
    double argument0, argument1;
    double inverse;
    int64_t zero, low, high;
    int64_t residual_kind;  // -1: there is none
    Place residual;
    double residual_scale, residual_shift;
};

struct Convolution {
    int64_t op;
    Place source, result;
    int64_t images, height, width, channels;  // of the result
    int64_t groups, group_in, group_out;      // channels of one group, in source and result; the last may have fewer
    int64_t rows_of_window, columns_of_window, run;  // run: bytes read at each place of the window, a multiple of 4
    const int64_t* rows;     // (height, rows_of_window): byte offset of a row or OUTSIDE
    const int64_t* columns;  // (width, columns_of_window)
    const uint8_t* padding;  // for places outside, as many bytes as the groups take before their run, and that
    const int8_t* weights;
    int64_t group_weights;  // bytes of one group's weights
    // Pixels are taken class by class; those of a class need the same places of the window, the others are zeros.
    int64_t classes;
    const int32_t* order;    // pixels of an image, class by class; null: as they lie
    const int64_t* ends;     // (classes): of the classes in this order
    const int32_t* places;   // of the window, class by class
    const int64_t* borders;  // (classes + 1): of the classes among the places
    Finish finish;
};

struct Depthwise {
    int64_t op;
    Place source, result;
    int64_t images, height, width, channels;
    int64_t rows_of_window, columns_of_window;
    int64_t source_width, stride, dilation, padding_left;  // along a row
    const int64_t* rows;                                   // (height, rows_of_window)
    const uint8_t* padding;                                // 64 bytes
    const int8_t* weights;  // (chunks of 64 channels, columns of the window, groups of 4 rows, 4 vectors, 64)
    Finish finish;           // scale and bias in the order of the vectors
};

struct Pooling {
    int64_t op;
    Place source, result;
    int64_t images, height, width, channels;
    int64_t rows_of_window, columns_of_window;
    const int64_t* rows;
    const int64_t* columns;
    int64_t average;  // 0: maximum
    int64_t count_padding;
    int64_t source_zero;
    double factor;  // average: y = (sum / count - source_zero) * factor
    int64_t kind;   // of source and result; real numbers have averages only
    int64_t zero, low, high;
};

// Real numbers to bytes, from any strides to N, H, W, C.
struct Entrance {
    int64_t op;
    Place source, result;
    int64_t images, height, width, channels;
    int64_t stride_image, stride_row, stride_column, stride_channel;  // of the source, in numbers
    int64_t result_row;                                               // bytes from one row of the result to the next
    double inverse;
    int64_t zero, low, high;
};

// A copy of bytes between strided places.
struct Copy {
    int64_t op;
    Place source, result;
    int64_t sizes[4], from[4], to[4];
    int64_t bytes;  // in one piece
};

struct Fill {
    int64_t op;
    Place result;
    int64_t bytes, value;
};

// One operand of a pointwise step.
struct Operand {
    int64_t shape;  // see below
    int64_t kind;
    Place place;
    double scale, shift;  // of bytes: real = byte * scale + shift; of one number for all elements: the number
};

enum Shape : int64_t { ELEMENT = 0, IMAGE_CHANNEL, WHOLE };  // what there is a number for

struct Operation {
    int64_t code;           // see below
    int64_t first, second;  // LOAD: operand; ACTIVATE: operation, activation; else: operations
    double argument0, argument1;
};
enum Code : int64_t { LOAD = 0, ADD, SUBTRACT, MULTIPLY, DIVIDE, ACTIVATE };

constexpr int MAX_OPERANDS = 8, MAX_OPERATIONS = 24, CHUNK = 512;

// A chain of elementwise operations on `pixels` x `channels` numbers of each image. Register i holds what operation i
// made; the last one is stored.
struct Pointwise {
    int64_t op;
    int64_t images, pixels, channels;
    int64_t operands, operations;
    Operand operand[MAX_OPERANDS];
    Operation operation[MAX_OPERATIONS];
    Place result;
    int64_t kind;
    double inverse;
    int64_t zero, low, high;
};

// Rows with mean 0 and variance 1, times a scale, plus a shift; or the softmax of rows.
struct Normalization {
    int64_t op;
    Place source, result;
    int64_t rows, channels;
    int64_t softmax;
    const float* scale;  // in whole vectors
    const float* shift;
    double epsilon;
    int64_t kind;
    double inverse;
    int64_t zero, low, high;
};

// Products of real matrices: (rows, depth) by (depth, columns), for each index of three outer dimensions. Strides are in
// bytes, and any but that of the result's columns, which lie side by side.
struct Product {
    int64_t op;
    Place left, right, result;
    int64_t sizes[3], left_outer[3], right_outer[3], result_outer[3];
    int64_t rows, columns, depth;
    int64_t left_row, left_depth, right_depth, right_column, result_row;
    double factor;
};

// A factor and a summand for each channel: bytes to real numbers and back to bytes.
struct Affine {
    int64_t op;
    Place source, result;
    int64_t images, pixels, channels;
    double source_scale, source_shift;  // real = byte * source_scale + source_shift
    const float* scale;                 // y = real * scale + shift; in chunks of 64 channels
    const float* shift;
    double inverse;
    int64_t zero, low, high;
};

// Rows of real numbers to bytes, each on a grid of its own, which covers the row and zero.
struct RowEntrance {
    int64_t op;
    Place source, result;
    Place scales, zeros;  // of the rows: float and int32
    int64_t rows, channels;
    int64_t low, high;
};

// Rows of such bytes times weights: y = (sum - zero * sum of weights) * scale of the row * scale + bias, and so on.
struct RowLinear {
    int64_t op;
    Place source, scales, zeros, result;
    int64_t rows, channels, run;  // channels: of the result; run: bytes of a row, a multiple of 4
    const int8_t* weights;        // as a convolution has them
    const int32_t* sums;          // of the weights of each output channel, in whole vectors
    Finish finish;
};

// Rows of real numbers times int8 weights, which become real numbers in registers.
struct WeightLinear {
    int64_t op;
    Place source, result;
    int64_t rows, channels, depth;
    const int8_t* weights;  // (blocks of output channels, depth, channels of the block)
    Finish finish;
};

// Attention on bytes: scores of queries with keys, weights in steps of 1/255 of each row's largest one, and the values
// added up by these weights. All inputs are real numbers, which are brought onto their grids here.
struct Attention {
    int64_t op;
    Place query, key, value, result, mask;
    int64_t sizes[3], key_heads;  // images, windows of an image, heads; heads of keys and values, which may be fewer
    int64_t rows, keys, depth, width;
    int64_t query_outer[3], key_outer[3], value_outer[3], result_outer[3], mask_outer[3];  // distances in bytes
    int64_t query_row, key_row, value_row, result_row, mask_row;
    int64_t mask_kind;  // -1: there is none; BYTES: not zero where it is open
    int64_t causal;
    double query_inverse, key_inverse, value_inverse;
    int64_t query_zero, query_low, query_high, key_zero, key_low, key_high, value_zero, value_low, value_high;
    double factor, value_scale;  // of a product of steps in a score; of a step of values
    int64_t kind;                // of the result
    double inverse;
    int64_t zero, low, high;
};

enum Op : int64_t {
    CONVOLUTION = 1, DEPTHWISE, POOLING, ENTRANCE, COPY, FILL, POINTWISE, NORMALIZATION, PRODUCT, ROW_ENTRANCE,
    ROW_LINEAR, WEIGHT_LINEAR, AFFINE, ATTENTION
};

// ---------------------------------------------------------------------------------------------------- arithmetic

INLINE __m512 power(__m512 x) {  // e^x
    const __m512 limit = _mm512_set1_ps(88.0f);
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), limit);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

INLINE __m512 inverse_of(__m512 x) {  // 1 / x
    __m512 y = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.0f)));
}

INLINE __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return inverse_of(_mm512_add_ps(one, power(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

INLINE __m512 hyperbolic(__m512 x) {  // tanh
    return _mm512_fmsub_ps(_mm512_set1_ps(2.0f), sigmoid(_mm512_add_ps(x, x)), _mm512_set1_ps(1.0f));
}

// Abramowitz and Stegun, formula 7.1.26: error below 1.5e-7.
INLINE __m512 error_function(__m512 x) {
    const __m512 sign = _mm512_set1_ps(-0.0f);
    __m512 a = _mm512_andnot_ps(sign, x);
    __m512 t = inverse_of(_mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
    __m512 p = _mm512_set1_ps(1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
    __m512 e = power(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(a, a)));
    __m512 y = _mm512_fnmadd_ps(_mm512_mul_ps(p, t), e, _mm512_set1_ps(1.0f));
    return _mm512_or_ps(y, _mm512_and_ps(sign, x));
}

INLINE __m512 activate(__m512 x, int64_t activation, float a, float b) {
    switch (activation) {
        case CLAMP:
            return _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(a)), _mm512_set1_ps(b));
        case HARDSIGMOID:
        case HARDSWISH: {
            __m512 y = _mm512_fmadd_ps(x, _mm512_set1_ps(1.0f / 6), _mm512_set1_ps(0.5f));
            y = _mm512_min_ps(_mm512_max_ps(y, _mm512_setzero_ps()), _mm512_set1_ps(1.0f));
            return activation == HARDSWISH ? _mm512_mul_ps(x, y) : y;
        }
        case SILU:
            return _mm512_mul_ps(x, sigmoid(x));
        case SIGMOID:
            return sigmoid(x);
        case TANH:
            return hyperbolic(x);
        case GELU: {
            __m512 y = error_function(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)));
            __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
            return _mm512_fmadd_ps(half, y, half);
        }
        case GELU_TANH: {
            __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
            __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
            __m512 y = hyperbolic(_mm512_mul_ps(inner, _mm512_set1_ps(0.79788456f)));
            __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
            return _mm512_fmadd_ps(half, y, half);
        }
        case LEAKY: {
            __m512 slope = _mm512_mul_ps(x, _mm512_set1_ps(a));
            return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), x, slope);
        }
        default:
            return x;
    }
}

// Four vectors of integers to 64 bytes; within 128-bit lanes the bytes of the vectors follow one another.
INLINE __m512i narrow(const __m512i q[4], __m512i zero, __m512i low, __m512i high) {
    __m512i left = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), zero);
    __m512i right = _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), zero);
    return _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(left, right), low), high);
}

// The order of 4-byte pieces that undoes `narrow`'s, where its vectors hold consecutive channels.
INLINE __m512i in_order(__m512i bytes) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, bytes);
}

INLINE __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ULL : (1ULL << count) - 1; }
INLINE __mmask16 first_floats(int64_t count) {
    return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

// Stores the first `count` of 64 bytes. Stores under a mask are slow, so that whole vectors do without.
INLINE void store_bytes(uint8_t* to, __m512i bytes, int64_t count) {
    if (count >= 64) {
        _mm512_storeu_si512(to, bytes);
    } else if (count == 48) {
        _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(bytes));
        _mm_storeu_si128((__m128i*)(to + 32), _mm512_extracti32x4_epi32(bytes, 2));
    } else if (count == 32) {
        _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(bytes));
    } else if (count == 16) {
        _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(bytes));
    } else {
        _mm512_mask_storeu_epi8(to, first_bytes(count), bytes);
    }
}

// Real numbers to integers. What is larger than any integer would become the smallest one.
INLINE __m512i to_integers(__m512 x) { return _mm512_cvtps_epi32(_mm512_min_ps(x, _mm512_set1_ps(2.0e9f))); }

struct Limits {
    __m512i zero, low, high;
    __m512 inverse;
    Limits(double factor, int64_t zero_, int64_t low_, int64_t high_)
        : zero(_mm512_set1_epi16((short)zero_)), low(_mm512_set1_epi8((char)low_)), high(_mm512_set1_epi8((char)high_)),
          inverse(_mm512_set1_ps((float)factor)) {}
};

INLINE __m512 residual_numbers(const Finish& f, const uint8_t* place, int64_t channel, __mmask16 mask) {
    if (f.residual_kind == BYTES) {
        __m512 r = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, place + channel)));
        return _mm512_fmadd_ps(r, _mm512_set1_ps((float)f.residual_scale), _mm512_set1_ps((float)f.residual_shift));
    }
    __m512 r = _mm512_maskz_loadu_ps(mask, (const float*)place + channel);
    return _mm512_mul_ps(r, _mm512_set1_ps((float)f.residual_scale));
}

// ---------------------------------------------------------------------------------------------------- convolution

// Finishes the sums of MR pixels and NB vectors of channels, which lie in memory: the compiler would not keep in
// registers what is handed on by address.
// lane: of the first scale and bias; channel: of the first number of the result.
template <int NB>
INLINE void finish_tile(int pixels, const int32_t (*sums)[16 * NB], const Finish& f, const Limits& limits,
                        int64_t lane, int64_t channel, int64_t count, uint8_t* const* results, const uint8_t* const* residuals) {
    __m512 scale[NB], bias[NB];
    UNROLL for (int n = 0; n < NB; n++) {
        scale[n] = _mm512_loadu_ps(f.scale + lane + 16 * n);
        bias[n] = _mm512_loadu_ps(f.bias + lane + 16 * n);
    }
    const int64_t bytes = std::min<int64_t>(count, 16 * NB);
    const __m512 inverse = limits.inverse;
    const __m512i zero = limits.zero, low = limits.low, high = limits.high;
    constexpr int TOGETHER = NB == 1 ? 4 : NB == 2 ? 2 : 1;  // pixels that are narrowed to bytes at once
    for (int m = 0; m < pixels; m += TOGETHER) {
        __m512 y[4];
        UNROLL for (int i = 0; i < 4; i++) {
            const int n = i % NB, p = m + i / NB;
            y[i] = _mm512_setzero_ps();
            if (i < NB * TOGETHER)
                y[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[p] + 16 * n)), scale[n], bias[n]);
        }
        if (f.residual_kind != -1) {
            UNROLL for (int i = 0; i < NB * TOGETHER; i++) {
                const int n = i % NB, p = m + i / NB;
                if (TOGETHER == 1 || p < pixels)
                    y[i] = _mm512_add_ps(
                        y[i], residual_numbers(f, residuals[p], channel + 16 * n, first_floats(count - 16 * n)));
            }
        }
        if (f.activation != NONE) {
            UNROLL for (int i = 0; i < NB * TOGETHER; i++)
                y[i] = activate(y[i], f.activation, (float)f.argument0, (float)f.argument1);
        }
        if (f.kind == FLOAT) {
            UNROLL for (int i = 0; i < NB * TOGETHER; i++) {
                const int n = i % NB, p = m + i / NB;
                if (TOGETHER == 1 || p < pixels)
                    _mm512_mask_storeu_ps((float*)results[p] + channel + 16 * n, first_floats(count - 16 * n), y[i]);
            }
            continue;
        }
        __m512i q[4];
        UNROLL for (int i = 0; i < 4; i++)
            q[i] = i < NB * TOGETHER ? _mm512_cvtps_epi32(_mm512_mul_ps(y[i], inverse)) : _mm512_setzero_si512();
        const __m512i made = in_order(narrow(q, zero, low, high));
        if constexpr (TOGETHER == 1) {
            store_bytes(results[m] + channel, made, bytes);
        } else if constexpr (TOGETHER == 2) {
            store_bytes(results[m] + channel, made, bytes);
            if (m + 1 < pixels)
                store_bytes(results[m + 1] + channel, _mm512_shuffle_i64x2(made, made, 0xEE), bytes);
        } else {
            store_bytes(results[m] + channel, made, bytes);
            if (m + 1 < pixels)
                store_bytes(results[m + 1] + channel, _mm512_shuffle_i64x2(made, made, 0x55), bytes);
            if (m + 2 < pixels)
                store_bytes(results[m + 2] + channel, _mm512_shuffle_i64x2(made, made, 0xAA), bytes);
            if (m + 3 < pixels)
                store_bytes(results[m + 3] + channel, _mm512_shuffle_i64x2(made, made, 0xFF), bytes);
        }
    }
}

// The output channels of one block: `offset` of their input channels in a pixel, their weights, the first of their
// scales (lane), where they go in a pixel of the result (channel), and how many there are.
struct Part {
    int64_t offset;
    const int8_t* weights;
    int64_t lane, channel, count, wide;
};

// The places of the window that a tile needs, by number (null: all), and where they lie for its pixels.
struct Window {
    const int32_t* numbers;
    int64_t count;
    const uint8_t* const* places;
};

template <int MR, int NB>
__attribute__((noinline)) void tile(const Convolution& c, const Part& part, const Window& window, const int8_t* ahead,
                                    const Limits& limits, uint8_t* const* results, const uint8_t* const* residuals) {
    const int64_t channel = part.channel;
    __m512i sums[MR][NB];
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int n = 0; n < NB; n++) sums[m][n] = _mm512_setzero_si512();
    const int64_t steps = c.run / 4;
    const int8_t* weights = part.weights;
    const uint8_t* const* places = window.places;
    for (int m = 0; m < MR; m++) __builtin_prefetch(results[m] + channel, 1);  // lines that are about to be written
    for (int64_t t = 0; t < window.count; t++, places += MR) {
        if (window.numbers) weights = part.weights + window.numbers[t] * steps * 64 * NB;
        const uint8_t* p[MR];
        UNROLL for (int m = 0; m < MR; m++) p[m] = places[m] + part.offset;
        for (int64_t k = 0; k < steps; k++, weights += 64 * NB, ahead += 64) {
            __m512i w[NB];
            _mm_prefetch(ahead, _MM_HINT_T1);
            UNROLL for (int n = 0; n < NB; n++) w[n] = _mm512_load_si512(weights + 64 * n);
            UNROLL for (int m = 0; m < MR; m++) {
                int32_t four;
                std::memcpy(&four, p[m] + 4 * k, 4);
                const __m512i x = _mm512_set1_epi32(four);
                UNROLL for (int n = 0; n < NB; n++) sums[m][n] = _mm512_dpbusd_epi32(sums[m][n], x, w[n]);
            }
        }
    }
    const Finish& f = c.finish;
    const bool bytes = f.kind == BYTES && f.activation == NONE && part.count >= 16 * NB;
    if (bytes && (f.residual_kind == -1 || f.residual_kind == BYTES)) {  // most tiles are finished out of registers
        const float *scale = f.scale + part.lane, *bias = f.bias + part.lane;
        const __m512 factor = _mm512_set1_ps((float)f.residual_scale), shift = _mm512_set1_ps((float)f.residual_shift);
        constexpr int TOGETHER = NB == 1 ? 4 : NB == 2 ? 2 : 1;  // pixels that are narrowed to bytes at once
        auto finish = [&](auto adds) __attribute__((always_inline)) {
            UNROLL for (int first = 0; first < MR; first += TOGETHER) {
                __m512i q[4];
                UNROLL for (int i = 0; i < 4; i++) {
                    const int n = i % NB, m = first + i / NB;
                    q[i] = _mm512_setzero_si512();
                    if (i >= NB * TOGETHER || m >= MR) continue;
                    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[m][n]), _mm512_loadu_ps(scale + 16 * n),
                                               _mm512_loadu_ps(bias + 16 * n));
                    if constexpr (adds) {
                        const __m128i r = _mm_loadu_si128((const __m128i*)(residuals[m] + channel + 16 * n));
                        y = _mm512_add_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(r)), factor, shift));
                    }
                    q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(y, limits.inverse));
                }
                const __m512i made = in_order(narrow(q, limits.zero, limits.low, limits.high));
                store_bytes(results[first] + channel, made, 16 * NB);
                if (TOGETHER == 2 && first + 1 < MR)
                    store_bytes(results[first + 1] + channel, _mm512_shuffle_i64x2(made, made, 0xEE), 16 * NB);
                if (TOGETHER == 4 && first + 1 < MR)
                    store_bytes(results[first + 1] + channel, _mm512_shuffle_i64x2(made, made, 0x55), 16 * NB);
                if (TOGETHER == 4 && first + 2 < MR)
                    store_bytes(results[first + 2] + channel, _mm512_shuffle_i64x2(made, made, 0xAA), 16 * NB);
                if (TOGETHER == 4 && first + 3 < MR)
                    store_bytes(results[first + 3] + channel, _mm512_shuffle_i64x2(made, made, 0xFF), 16 * NB);
            }
        };
        if (f.residual_kind == BYTES)
            finish(std::true_type());
        else
            finish(std::false_type());
        return;
    }
    alignas(64) int32_t made[MR + 3][16 * NB];  // the last pixels are finished four at a time
    UNROLL for (int m = 0; m < MR; m++)
        UNROLL for (int n = 0; n < NB; n++) _mm512_store_si512(made[m] + 16 * n, sums[m][n]);
    finish_tile<NB>(MR, made, f, limits, part.lane, channel, part.count, results, residuals);
}

template <int NB>
void tiles(const Convolution& c, const Part& part, int pixels, const Window& window, const int8_t* ahead,
           const Limits& limits, uint8_t* const* results, const uint8_t* const* residuals) {
#define CASE(MR) \
    case MR: return tile<MR, NB>(c, part, window, ahead, limits, results, residuals)
    if constexpr (NB == 4) {
        switch (pixels) { CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); }
    } else if constexpr (NB == 3) {
        switch (pixels) { CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8); }
    } else if constexpr (NB == 2) {
        switch (pixels) {
            CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
        }
    } else {
        switch (pixels) {
            CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
            CASE(13); CASE(14);
        }
    }
#undef CASE
}

constexpr int64_t RESIDENT = 384 << 10;  // weights up to here are read from the cache again and again
constexpr int64_t STRIP = 96 << 10;      // bytes of a strip of pixels, in source and result
constexpr int64_t GROUPS = 64;           // that share what is looked up for a tile
constexpr int TILE[5] = {0, 14, 12, 8, 6};  // pixels of a tile by the number of vectors

// Tiles of pixels of one class, of sizes as equal as possible, and for each of them the parts, which are equally wide:
// where the places of a window lie is looked up once for all groups. [from, to) of the class's pixels in all images.
// ORDERED: whether there are classes, or all pixels as they lie, each with its whole window.
template <bool ORDERED>
void walk_class(const Convolution& c, int64_t number, const Part* parts, int64_t count, const Limits& limits,
                int64_t from, int64_t to, const uint8_t* source, uint8_t* result, const uint8_t* residual) {
    const int64_t wide = parts->wide;
    const Finish& f = c.finish;
    const int64_t first = number ? c.ends[number - 1] : 0, last = c.ends[number], each = last - first;
    const int64_t pieces = (to - from + TILE[wide] - 1) / TILE[wide];
    const int64_t least = (to - from) / pieces, more = (to - from) % pieces;
    int64_t image = from / each, at = first + from % each, row = 0, column = 0;
    const int64_t* rows = c.rows;
    const int64_t* columns = c.columns;
    source += image * c.source.image;
    result += image * c.result.image;
    if (residual) residual += image * f.residual.image;
    if (!ORDERED) {
        row = at / c.width, column = at % c.width;
        rows += row * c.rows_of_window, columns += column * c.columns_of_window;
        result += at * c.result.pixel;
        if (residual) residual += at * f.residual.pixel;
    }
    const uint8_t* places[14 * MAX_PLACES];
    uint8_t* results[14];
    const uint8_t* residuals[14];
    const int32_t* numbers = c.places + c.borders[number];
    const int64_t every = c.rows_of_window * c.columns_of_window;
    const int64_t needed = ORDERED ? c.borders[number + 1] - c.borders[number] : every;
    const Window window{needed < every ? numbers : nullptr, needed, places};
    int16_t rows_of[ORDERED ? MAX_PLACES : 1], columns_of[ORDERED ? MAX_PLACES : 1];
    for (int64_t t = 0; ORDERED && t < window.count; t++) {
        rows_of[t] = numbers[t] / c.columns_of_window;
        columns_of[t] = numbers[t] % c.columns_of_window;
    }
    const int64_t piece = every * (c.run / 4) * 64;  // of weights, fetched by a tile
    for (int64_t i = 0; i < pieces; i++) {
        const int mr = (int)(least + (i < more));
        for (int m = 0; m < mr; m++) {
            if constexpr (ORDERED) {
                const uint32_t pixel = c.order[at], y = pixel / (uint32_t)c.width, x = pixel - y * (uint32_t)c.width;
                rows = c.rows + y * c.rows_of_window, columns = c.columns + x * c.columns_of_window;
                results[m] = result + pixel * c.result.pixel;
                if (residual) residuals[m] = residual + pixel * f.residual.pixel;
            } else {
                results[m] = result;
                residuals[m] = residual;
            }
            const uint8_t** place = places + m;
            auto look = [&](int64_t y, int64_t x) __attribute__((always_inline)) {
                const int64_t offset = rows[y] + columns[x];
                *place = offset < 0 ? c.padding : source + offset;
                place += mr;
            };
            if (ORDERED && window.count < every)
                for (int64_t t = 0; t < window.count; t++) look(rows_of[t], columns_of[t]);
            else
                for (int64_t y = 0; y < c.rows_of_window; y++)
                    for (int64_t x = 0; x < c.columns_of_window; x++) look(y, x);
            if constexpr (ORDERED) {
                if (++at < last) continue;
                at = first;
                source += c.source.image;
                result += c.result.image;
                if (residual) residual += f.residual.image;
            } else {
                result += c.result.pixel;
                if (residual) residual += f.residual.pixel;
                columns += c.columns_of_window;
                if (++column < c.width) continue;
                column = 0;
                columns = c.columns;
                rows += c.rows_of_window;
                if (++row < c.height) continue;
                row = 0;
                rows = c.rows;
                source += c.source.image;
                result += c.result.image - each * c.result.pixel;
                if (residual) residual += f.residual.image - each * f.residual.pixel;
            }
        }
        for (const Part* part = parts; part < parts + count; part++) {
            const int8_t* ahead = part->weights + (i < wide ? wide + i : i % wide) * piece;
            switch (wide) {
                case 4: tiles<4>(c, *part, mr, window, ahead, limits, results, residuals); break;
                case 3: tiles<3>(c, *part, mr, window, ahead, limits, results, residuals); break;
                case 2: tiles<2>(c, *part, mr, window, ahead, limits, results, residuals); break;
                default: tiles<1>(c, *part, mr, window, ahead, limits, results, residuals);
            }
        }
    }
}

// The pixels [from, to) of all images, class by class.
void walk(const Convolution& c, const Part* parts, int64_t count, const Limits& limits, int64_t from, int64_t to,
          const uint8_t* source, uint8_t* result, const uint8_t* residual) {
    if (!c.order) return walk_class<false>(c, 0, parts, count, limits, from, to, source, result, residual);
    for (int64_t k = 0, begin = 0; k < c.classes && begin < to; begin = c.images * c.ends[k++]) {
        const int64_t low = std::max(from, begin), high = std::min(to, c.images * c.ends[k]);
        if (low < high) walk_class<true>(c, k, parts, count, limits, low - begin, high - begin, source, result, residual);
    }
}

// How many places of windows there are to multiply, for all pixels of all images.
int64_t work(const Convolution& c) {
    int64_t found = 0;
    for (int64_t k = 0; k < c.classes; k++)
        found += c.images * (c.ends[k] - (k ? c.ends[k - 1] : 0)) * (c.borders[k + 1] - c.borders[k]);
    return found;
}

// The pixel, in the order in which they are taken, in front of which so much of that work lies.
int64_t pixel_behind(const Convolution& c, int64_t much) {
    int64_t begin = 0;
    for (int64_t k = 0; k < c.classes; begin = c.images * c.ends[k++]) {
        const int64_t each = c.borders[k + 1] - c.borders[k], pixels = c.images * c.ends[k] - begin;
        if (much <= pixels * each) return begin + std::max<int64_t>(much, 0) / each;
        much -= pixels * each;
    }
    return begin;
}

void convolve(const Convolution& c, uint8_t* const* buffers, int thread, int threads) {
    const Finish& f = c.finish;
    const Limits limits(f.inverse, f.zero, f.low, f.high);
    const int64_t window = c.rows_of_window * c.columns_of_window;
    const int64_t vectors = (c.group_out + 15) / 16, blocks = (vectors + 3) / 4;
    const int64_t pixels = c.images * c.height * c.width;
    const int64_t size = f.kind == FLOAT ? 4 : 1;

    const int64_t group_bytes = vectors * window * c.run * 16;

    auto part = [&](int64_t g, int64_t b) {
        const int64_t vector = vectors / blocks * b + std::min(b, vectors % blocks);
        return Part{g * c.group_in,
                    c.weights + g * c.group_weights + vector * window * c.run * 16,
                    16 * (g * vectors + vector),
                    g * c.group_out + 16 * vector,
                    std::min(c.group_out, c.channels - g * c.group_out) - 16 * vector,
                    vectors / blocks + (b < vectors % blocks)};
    };
    const uint8_t* source = buffers[c.source.buffer] + c.source.offset;
    uint8_t* result = buffers[c.result.buffer] + c.result.offset;
    const uint8_t* residual = f.residual_kind == -1 ? nullptr : buffers[f.residual.buffer] + f.residual.offset;

    if (c.groups * group_bytes <= RESIDENT) {
        // Each thread has its own pixels, in strips that stay in its cache while all channels are made.
        const int64_t wide = c.groups * (c.run * c.columns_of_window + c.group_out * size);
        const int64_t strip = std::max<int64_t>(48, STRIP / wide / 24 * 24);
        const int64_t all = work(c);
        const int64_t begin = pixel_behind(c, all * thread / threads);
        const int64_t end = thread + 1 < threads ? pixel_behind(c, all * (thread + 1) / threads) : pixels;
        for (int64_t from = begin; from < end; from += strip)
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t g = 0; g < c.groups; g += GROUPS) {
                    Part parts[GROUPS];
                    int64_t count = 0;
                    for (int64_t i = g; i < std::min(c.groups, g + GROUPS); i++) {
                        parts[count] = part(i, b);
                        count += parts[count].count > 0;
                    }
                    if (count) walk(c, parts, count, limits, from, std::min(end, from + strip), source, result, residual);
                }
        return;
    }
    // Each thread has its own weights, as many as it can: shares of the blocks, and of the pixels of the last one.
    const int64_t all = work(c), total = c.groups * vectors * all;
    const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
    int64_t before = 0;
    for (int64_t g = 0; g < c.groups; g++) {
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t wide = vectors / blocks + (b < vectors % blocks);
            const int64_t from = pixel_behind(c, (begin - before) / wide);
            const int64_t to = end - before >= wide * all ? pixels : pixel_behind(c, (end - before) / wide);
            const Part one = part(g, b);
            if (from < to && one.count > 0) walk(c, &one, 1, limits, from, to, source, result, residual);
            before += wide * all;
        }
    }
}

// ------------------------------------------------------------------------------------------- depthwise convolution

// Four rows of 64 bytes to four vectors, whose 4-byte pieces hold one channel of each row.
INLINE void interleave(const __m512i row[4], __m512i vector[4]) {
    __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
    __m512i c = _mm512_unpacklo_epi8(row[2], row[3]), d = _mm512_unpackhi_epi8(row[2], row[3]);
    vector[0] = _mm512_unpacklo_epi16(a, c);
    vector[1] = _mm512_unpackhi_epi16(a, c);
    vector[2] = _mm512_unpacklo_epi16(b, d);
    vector[3] = _mm512_unpackhi_epi16(b, d);
}

// Memory of a thread for what one row needs; grows, and goes with the thread.
uint8_t* scratch(size_t bytes) {
    static thread_local std::unique_ptr<uint8_t, decltype(&std::free)> memory(nullptr, &std::free);
    static thread_local size_t size = 0;
    if (size < bytes) {
        size = (bytes + 4095) / 4096 * 4096;
        memory.reset((uint8_t*)std::aligned_alloc(64, size));
    }
    return memory.get();
}

// Row by row and 64 channels at a time. First the columns that the row needs, padding included, are brought into the
// form in which four rows of the window stand side by side; then each pixel is a sum over the columns of its window.
// QUADS, KERNEL: size of the window where it is known, in groups of four rows and in columns; 0: any.
template <int QUADS, int KERNEL, bool PLAIN>
void depthwise_row(const Depthwise& c, const uint8_t* base, const uint8_t* padding, const int64_t* rows,
                   const int8_t* weights, int64_t chunk, int64_t count, const Limits& limits, uint8_t* to,
                   int64_t to_step) {
    const Finish& f = c.finish;
    const int64_t kernel = KERNEL ? KERNEL : c.columns_of_window, stride = c.stride, dilation = c.dilation;
    const int64_t first = -c.padding_left, last = (c.width - 1) * stride + (kernel - 1) * dilation - c.padding_left;
    const __mmask64 mask = first_bytes(count);
    const int64_t quads = QUADS ? QUADS : (c.rows_of_window + 3) / 4;
    int8_t* ready = (int8_t*)scratch((last - first + 1) * quads * 256);
    for (int64_t q = 0; q < quads; q++) {
        const uint8_t* row[4];
        int64_t step[4];
        UNROLL for (int i = 0; i < 4; i++) {
            const bool here = 4 * q + i < c.rows_of_window && rows[4 * q + i] >= 0;
            row[i] = here ? base + rows[4 * q + i] : padding;  // behind the last row, weights are zero
            step[i] = here ? c.source.pixel : 0;
        }
        __m512i taps[4], vectors[4];
        taps[0] = taps[1] = taps[2] = taps[3] = _mm512_loadu_si512(padding);
        interleave(taps, vectors);
        for (int64_t j = first; j <= last; j++) {
            if (j >= 0 && j < c.source_width) continue;
            UNROLL for (int v = 0; v < 4; v++)
                _mm512_store_si512(ready + ((j - first) * quads + q) * 256 + 64 * v, vectors[v]);
        }
        int8_t* into = ready + (-first * quads + q) * 256;
        const bool three = 4 * q + 3 >= c.rows_of_window;
        for (int64_t j = 0; j < c.source_width && j <= last; j++, into += quads * 256) {
            UNROLL for (int i = 0; i < 3; i++) taps[i] = _mm512_maskz_loadu_epi8(mask, row[i] + j * step[i]);
            taps[3] = three ? taps[2] : _mm512_maskz_loadu_epi8(mask, row[3] + j * step[3]);
            interleave(taps, vectors);
            UNROLL for (int v = 0; v < 4; v++) _mm512_store_si512(into + 64 * v, vectors[v]);
        }
    }
    __m512 scale[4], bias[4];
    UNROLL for (int v = 0; v < 4; v++) {
        scale[v] = _mm512_loadu_ps(f.scale + 64 * chunk + 16 * v);
        bias[v] = _mm512_loadu_ps(f.bias + 64 * chunk + 16 * v);
    }
    const __m512 inverse = limits.inverse;
    const __m512i zero = limits.zero, low = limits.low, high = limits.high;
    const int64_t window_step = dilation * quads * 256;
    constexpr int HELD = KERNEL == 3 && QUADS == 1 ? 12 : 0;  // weights that stay in registers
    __m512i held[HELD ? HELD : 1];
    UNROLL for (int i = 0; i < HELD; i++) held[i] = _mm512_load_si512(weights + 64 * i);
    for (int64_t x = 0; x < c.width; x++, to += to_step) {
        __m512i sums[4];
        UNROLL for (int v = 0; v < 4; v++) sums[v] = _mm512_setzero_si512();
        const int8_t* column = ready + x * stride * quads * 256;
        const int8_t* w = weights;
        if constexpr (HELD > 0) {
            UNROLL for (int k = 0; k < KERNEL; k++)
                UNROLL for (int v = 0; v < 4; v++)
                    sums[v] = _mm512_dpbusd_epi32(sums[v], _mm512_load_si512(column + k * window_step + 64 * v),
                                                  held[4 * k + v]);
        } else for (int64_t k = 0; k < kernel; k++, column += window_step) {
            const int8_t* quad = column;
            for (int64_t q = 0; q < quads; q++, quad += 256, w += 256) {
                UNROLL for (int v = 0; v < 4; v++)
                    sums[v] = _mm512_dpbusd_epi32(sums[v], _mm512_load_si512(quad + 64 * v),
                                                  _mm512_load_si512(w + 64 * v));
            }
        }
        __m512 values[4];
        UNROLL for (int v = 0; v < 4; v++) values[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[v]), scale[v], bias[v]);
        if (!PLAIN && f.activation != NONE)
            UNROLL for (int v = 0; v < 4; v++)
                values[v] = activate(values[v], f.activation, (float)f.argument0, (float)f.argument1);
        if (PLAIN || f.kind == BYTES) {
            __m512i q[4];
            UNROLL for (int v = 0; v < 4; v++) q[v] = _mm512_cvtps_epi32(_mm512_mul_ps(values[v], inverse));
            store_bytes(to, narrow(q, zero, low, high), count);
        } else {
            alignas(64) float numbers[64];
            UNROLL for (int v = 0; v < 4; v++) {
                _mm_store_ps(numbers + 4 * v, _mm512_extractf32x4_ps(values[v], 0));
                _mm_store_ps(numbers + 16 + 4 * v, _mm512_extractf32x4_ps(values[v], 1));
                _mm_store_ps(numbers + 32 + 4 * v, _mm512_extractf32x4_ps(values[v], 2));
                _mm_store_ps(numbers + 48 + 4 * v, _mm512_extractf32x4_ps(values[v], 3));
            }
            std::memcpy(to, numbers, 4 * count);
        }
    }
}

void convolve_depthwise(const Depthwise& c, uint8_t* const* buffers, int thread, int threads) {
    const Finish& f = c.finish;
    const Limits limits(f.inverse, f.zero, f.low, f.high);
    const int64_t quads = (c.rows_of_window + 3) / 4, size = f.kind == FLOAT ? 4 : 1;
    const int64_t chunks = (c.channels + 63) / 64, lines = c.images * c.height, total = chunks * lines;
    for (int64_t work = total * thread / threads; work < total * (thread + 1) / threads; work++) {
        const int64_t chunk = work % chunks, line = work / chunks, image = line / c.height, row = line % c.height;
        const uint8_t* base = buffers[c.source.buffer] + c.source.offset + image * c.source.image + 64 * chunk;
        uint8_t* to = buffers[c.result.buffer] + c.result.offset + image * c.result.image +
                      row * c.width * c.result.pixel + 64 * chunk * size;
        const bool plain = f.kind == BYTES && f.activation == NONE;
        const auto run = quads == 1 && c.columns_of_window == 3   ? plain ? depthwise_row<1, 3, true> : depthwise_row<1, 3, false>
                         : quads == 2 && c.columns_of_window == 5 ? plain ? depthwise_row<2, 5, true> : depthwise_row<2, 5, false>
                                                                  : depthwise_row<0, 0, false>;
        run(c, base, c.padding, c.rows + row * c.rows_of_window, c.weights + chunk * c.columns_of_window * quads * 256,
            chunk, std::min<int64_t>(64, c.channels - 64 * chunk), limits, to, c.result.pixel);
    }
}

// -------------------------------------------------------------------------------------------------------- pooling

void pool(const Pooling& c, uint8_t* const* buffers, int thread, int threads) {
    const int64_t pixels = c.images * c.height * c.width, wide = c.average ? 16 : 64, size = c.kind == FLOAT ? 4 : 1;
    const int64_t chunks = (c.channels + wide - 1) / wide, total = chunks * pixels;
    const Limits limits(1.0, c.zero, c.low, c.high);
    for (int64_t work = total * thread / threads; work < total * (thread + 1) / threads; work++) {
        const int64_t pixel = work / chunks, chunk = work % chunks;
        const int64_t image = pixel / (c.height * c.width), row = pixel / c.width % c.height, column = pixel % c.width;
        const int64_t count = std::min<int64_t>(wide, c.channels - wide * chunk);
        const uint8_t* base = buffers[c.source.buffer] + c.source.offset + image * c.source.image + wide * chunk * size;
        const int64_t* rows = c.rows + row * c.rows_of_window;
        const int64_t* columns = c.columns + column * c.columns_of_window;
        uint8_t* to = buffers[c.result.buffer] + c.result.offset + image * c.result.image +
                      (row * c.width + column) * c.result.pixel + wide * chunk * size;
        if (!c.average) {
            const __mmask64 mask = first_bytes(count);
            __m512i best = _mm512_setzero_si512();
            for (int64_t y = 0; y < c.rows_of_window; y++) {
                if (rows[y] == OUTSIDE) continue;
                for (int64_t x = 0; x < c.columns_of_window; x++)
                    if (columns[x] != OUTSIDE)
                        best = _mm512_max_epu8(best, _mm512_maskz_loadu_epi8(mask, base + rows[y] + columns[x]));
            }
            store_bytes(to, best, count);
            continue;
        }
        const __mmask16 mask = first_floats(count);
        __m512i sum = _mm512_setzero_si512();
        __m512 real_sum = _mm512_setzero_ps();
        int64_t inside = 0;
        for (int64_t y = 0; y < c.rows_of_window; y++) {
            if (rows[y] == OUTSIDE) continue;
            for (int64_t x = 0; x < c.columns_of_window; x++)
                if (columns[x] != OUTSIDE) {
                    const uint8_t* from = base + rows[y] + columns[x];
                    inside++;
                    if (c.kind == FLOAT)
                        real_sum = _mm512_add_ps(real_sum, _mm512_maskz_loadu_ps(mask, (const float*)from));
                    else
                        sum = _mm512_add_epi32(sum, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from)));
                }
        }
        const int64_t divisor = c.count_padding ? c.rows_of_window * c.columns_of_window : inside;
        if (c.kind == FLOAT) {
            _mm512_mask_storeu_ps((float*)to, mask, _mm512_div_ps(real_sum, _mm512_set1_ps((float)divisor)));
            continue;
        }
        const float zero = (float)(inside * c.source_zero), factor = (float)(c.factor / (double)divisor);
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(zero)), _mm512_set1_ps(factor));
        const __m512i nothing = _mm512_setzero_si512(), q[4] = {_mm512_cvtps_epi32(y), nothing, nothing, nothing};
        const __m512i bytes = in_order(narrow(q, limits.zero, limits.low, limits.high));
        _mm_mask_storeu_epi8(to, mask, _mm512_castsi512_si128(bytes));
    }
}

// ----------------------------------------------------------------------------------------------- copies and entrance

void enter(const Entrance& c, uint8_t* const* buffers, int thread, int threads) {
    const float* source = (const float*)(buffers[c.source.buffer] + c.source.offset);
    uint8_t* result = buffers[c.result.buffer] + c.result.offset;
    const Limits limits(c.inverse, c.zero, c.low, c.high);
    const int64_t lines = c.images * c.height;
    const bool side_by_side = c.stride_channel == 1 && c.stride_column == c.channels;
    for (int64_t line = lines * thread / threads; line < lines * (thread + 1) / threads; line++) {
        const int64_t image = line / c.height, row = line % c.height;
        const float* from = source + image * c.stride_image + row * c.stride_row;
        uint8_t* to = result + image * c.result.image + row * c.result_row;
        auto bytes = [&](__m512 x) {
            __m512i q[4] = {to_integers(_mm512_mul_ps(x, limits.inverse)), _mm512_setzero_si512(),
                            _mm512_setzero_si512(), _mm512_setzero_si512()};
            return _mm512_castsi512_si128(in_order(narrow(q, limits.zero, limits.low, limits.high)));
        };
        if (side_by_side) {
            const int64_t count = c.width * c.channels;
            for (int64_t i = 0; i < count; i += 16) {
                const __mmask16 mask = first_floats(count - i);
                _mm_mask_storeu_epi8(to + i, mask, bytes(_mm512_maskz_loadu_ps(mask, from + i)));
            }
            continue;
        }
#ifdef __AVX512VBMI__
        if (c.channels == 3 && c.stride_column == 1) {
            alignas(64) uint8_t order[64] = {};
            for (int i = 0; i < 48; i++) order[i] = (uint8_t)(i % 3 * 16 + i / 3);
            for (int64_t x = 0; x < c.width; x += 16) {
                const __mmask16 mask = first_floats(c.width - x);
                __m512i q[4];
                UNROLL for (int i = 0; i < 3; i++)
                    q[i] = to_integers(
                        _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + x + i * c.stride_channel), limits.inverse));
                q[3] = _mm512_setzero_si512();
                const __m512i planes = in_order(narrow(q, limits.zero, limits.low, limits.high));
                store_bytes(to + 3 * x, _mm512_permutexvar_epi8(_mm512_load_si512(order), planes),
                            std::min<int64_t>(48, 3 * (c.width - x)));
            }
            continue;
        }
#endif
        for (int64_t x = 0; x < c.width; x += 16) {
            const int64_t count = std::min<int64_t>(16, c.width - x);
            const __mmask16 mask = first_floats(count);
            for (int64_t channel = 0; channel < c.channels; channel++) {
                const float* start = from + x * c.stride_column + channel * c.stride_channel;
                alignas(16) uint8_t piece[16];
                __m512 numbers;
                if (c.stride_column == 1) {
                    numbers = _mm512_maskz_loadu_ps(mask, start);
                } else {
                    alignas(64) float gathered[16] = {};
                    for (int64_t i = 0; i < count; i++) gathered[i] = start[i * c.stride_column];
                    numbers = _mm512_load_ps(gathered);
                }
                _mm_store_si128((__m128i*)piece, bytes(numbers));
                for (int64_t i = 0; i < count; i++) to[(x + i) * c.channels + channel] = piece[i];
            }
        }
    }
}

void interleave_rows(const uint8_t* row, int64_t other, int64_t count, uint8_t* to) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t i = 0; i < count; i += 64) {
        const __mmask64 mask = first_bytes(count - i);
        const __m512i a = _mm512_maskz_loadu_epi8(mask, row + i), b = _mm512_maskz_loadu_epi8(mask, row + other + i);
        const __m512i x = _mm512_unpacklo_epi8(a, b), y = _mm512_unpackhi_epi8(a, b);
        store_bytes(to + 2 * i, _mm512_permutex2var_epi64(x, low, y), 2 * (count - i));
        if (count - i > 32) store_bytes(to + 2 * i + 64, _mm512_permutex2var_epi64(x, high, y), 2 * (count - i) - 64);
    }
}

void copy(const Copy& c, uint8_t* const* buffers, int thread, int threads) {
    const uint8_t* source = buffers[c.source.buffer] + c.source.offset;
    uint8_t* result = buffers[c.result.buffer] + c.result.offset;
    if (c.bytes == 1 && c.sizes[3] == 2 && c.to[3] == 1 && c.to[2] == 2 && c.from[2] == 1) {
        const int64_t lines = c.sizes[0] * c.sizes[1];  // two rows of bytes into one, in turn: a channel shuffle
        for (int64_t work = lines * thread / threads; work < lines * (thread + 1) / threads; work++) {
            const int64_t j = work % c.sizes[1], i = work / c.sizes[1];
            interleave_rows(source + i * c.from[0] + j * c.from[1], c.from[3], c.sizes[2],
                            result + i * c.to[0] + j * c.to[1]);
        }
        return;
    }
    const int64_t total = c.sizes[0] * c.sizes[1] * c.sizes[2];
    for (int64_t work = total * thread / threads; work < total * (thread + 1) / threads; work++) {
        const int64_t k = work % c.sizes[2], j = work / c.sizes[2] % c.sizes[1], i = work / c.sizes[2] / c.sizes[1];
        const uint8_t* from = source + i * c.from[0] + j * c.from[1] + k * c.from[2];
        uint8_t* to = result + i * c.to[0] + j * c.to[1] + k * c.to[2];
        if (c.bytes == 1) {
            for (int64_t l = 0; l < c.sizes[3]; l++) to[l * c.to[3]] = from[l * c.from[3]];
        } else if (c.bytes == 4) {
            for (int64_t l = 0; l < c.sizes[3]; l++) std::memcpy(to + l * c.to[3], from + l * c.from[3], 4);
        } else {
            for (int64_t l = 0; l < c.sizes[3]; l++) std::memcpy(to + l * c.to[3], from + l * c.from[3], c.bytes);
        }
    }
}

void fill(const Fill& c, uint8_t* const* buffers, int thread, int threads) {
    uint8_t* result = buffers[c.result.buffer] + c.result.offset;
    const int64_t from = c.bytes * thread / threads, to = c.bytes * (thread + 1) / threads;
    std::memset(result + from, (int)c.value, to - from);
}

// ------------------------------------------------------------------------------------------------------ pointwise

void load(const Operand& o, const uint8_t* base, int64_t image, int64_t pixel, int64_t pixels, int64_t channel,
          int64_t channels, float* to) {
    const int64_t count = pixels * channels;
    if (o.shape == WHOLE) {
        std::fill(to, to + count, (float)o.shift);
        return;
    }
    const int64_t size = o.kind == FLOAT ? 4 : 1, step = o.shape == ELEMENT ? o.place.pixel : 0;
    const int64_t width = step == channels * size ? count : channels;  // numbers that lie side by side
    const uint8_t* from = base + image * o.place.image + pixel * step + channel * size;
    for (int64_t done = 0; done < count; done += width, to += width, from += step) {
        if (o.kind == FLOAT) {
            std::memcpy(to, from, 4 * width);
            continue;
        }
        const __m512 scale = _mm512_set1_ps((float)o.scale), shift = _mm512_set1_ps((float)o.shift);
        for (int64_t i = 0; i < width; i += 16) {
            const __mmask16 mask = first_floats(width - i);
            __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from + i)));
            _mm512_mask_storeu_ps(to + i, mask, _mm512_fmadd_ps(x, scale, shift));
        }
    }
}

void operate(const Operation& o, float registers[][CHUNK], float* to, int64_t count) {
    const float *a = registers[o.first], *b = o.code == ACTIVATE ? a : registers[o.second];
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 x = _mm512_load_ps(a + i), y = _mm512_load_ps(b + i);
        __m512 z;
        switch (o.code) {
            case ADD: z = _mm512_add_ps(x, y); break;
            case SUBTRACT: z = _mm512_sub_ps(x, y); break;
            case MULTIPLY: z = _mm512_mul_ps(x, y); break;
            case DIVIDE: z = _mm512_div_ps(x, y); break;
            default: z = activate(x, (int64_t)o.second, (float)o.argument0, (float)o.argument1);
        }
        _mm512_store_ps(to + i, z);
    }
}

void to_bytes(const float* from, uint8_t* to, int64_t count, const Limits& limits) {
    for (int64_t i = 0; i < count; i += 64) {
        __m512i q[4];
        UNROLL for (int v = 0; v < 4; v++) {
            const __m512 x = _mm512_maskz_loadu_ps(first_floats(count - i - 16 * v), from + i + 16 * v);
            q[v] = to_integers(_mm512_mul_ps(x, limits.inverse));
        }
        store_bytes(to + i, in_order(narrow(q, limits.zero, limits.low, limits.high)), count - i);
    }
}

void pointwise(const Pointwise& c, uint8_t* const* buffers, int thread, int threads) {
    const Limits limits(c.inverse, c.zero, c.low, c.high);
    const int64_t together = std::max<int64_t>(1, CHUNK / c.channels);  // pixels of a chunk
    const int64_t width = std::min<int64_t>(CHUNK, c.channels);         // channels of a chunk
    const int64_t groups = (c.pixels + together - 1) / together, pieces = (c.channels + width - 1) / width;
    const int64_t total = c.images * groups * pieces, size = c.kind == FLOAT ? 4 : 1;
    alignas(64) float registers[MAX_OPERATIONS][CHUNK];
    for (int64_t work = total * thread / threads; work < total * (thread + 1) / threads; work++) {
        const int64_t piece = work % pieces, group = work / pieces % groups, image = work / pieces / groups;
        const int64_t pixel = group * together, pixels = std::min(together, c.pixels - pixel);
        const int64_t channel = piece * width, channels = std::min(width, c.channels - channel);
        const int64_t count = pixels * channels;
        for (int64_t i = 0; i < c.operations; i++) {
            const Operation& o = c.operation[i];
            if (o.code == LOAD) {
                const Operand& from = c.operand[o.first];
                const uint8_t* base = from.shape == WHOLE ? nullptr : buffers[from.place.buffer] + from.place.offset;
                load(from, base, image, pixel, pixels, channel, channels, registers[i]);
            } else {
                operate(o, registers, registers[i], count);
            }
        }
        const float* last = registers[c.operations - 1];
        uint8_t* to = buffers[c.result.buffer] + c.result.offset + image * c.result.image + pixel * c.result.pixel +
                      channel * size;
        const bool flat = c.result.pixel == channels * size;
        for (int64_t p = 0; p < (flat ? 1 : pixels); p++, to += c.result.pixel, last += channels) {
            const int64_t numbers = flat ? count : channels;
            if (c.kind == FLOAT) {
                std::memcpy(to, last, 4 * numbers);
                continue;
            }
            to_bytes(last, to, numbers, limits);
        }
    }
}

void affine(const Affine& c, uint8_t* const* buffers, int thread, int threads) {
    const Limits limits(c.inverse, c.zero, c.low, c.high);
    const __m512 source_scale = _mm512_set1_ps((float)c.source_scale), source_shift = _mm512_set1_ps((float)c.source_shift);
    const int64_t total = c.images * c.pixels;
    for (int64_t work = total * thread / threads; work < total * (thread + 1) / threads; work++) {
        const int64_t image = work / c.pixels, pixel = work % c.pixels;
        const uint8_t* from = buffers[c.source.buffer] + c.source.offset + image * c.source.image + pixel * c.source.pixel;
        uint8_t* to = buffers[c.result.buffer] + c.result.offset + image * c.result.image + pixel * c.result.pixel;
        for (int64_t i = 0; i < c.channels; i += 64) {
            __m512i q[4];
            UNROLL for (int v = 0; v < 4; v++) {
                const int64_t at = i + 16 * v;
                const __m128i bytes = c.channels >= at + 16 ? _mm_loadu_si128((const __m128i*)(from + at))
                                                            : _mm_maskz_loadu_epi8(first_floats(c.channels - at), from + at);
                __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
                x = _mm512_fmadd_ps(x, source_scale, source_shift);
                x = _mm512_add_ps(_mm512_mul_ps(x, _mm512_load_ps(c.scale + at)), _mm512_load_ps(c.shift + at));
                q[v] = to_integers(_mm512_mul_ps(x, limits.inverse));
            }
            store_bytes(to + i, in_order(narrow(q, limits.zero, limits.low, limits.high)), c.channels - i);
        }
    }
}

// -------------------------------------------------------------------------------------------------- normalization

void softmax(const float* from, float* to, int64_t count) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 largest = lowest, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16)
        largest = _mm512_max_ps(largest, _mm512_mask_loadu_ps(lowest, first_floats(count - i), from + i));
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = first_floats(count - i);
        const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, from + i), top);
        // Below -87, where `power` ends, a summand is nothing.
        const __m512 y = _mm512_maskz_mov_ps(mask & _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ), power(x));
        _mm512_mask_storeu_ps(to + i, mask, y);
        sum = _mm512_add_ps(sum, y);
    }
    const __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = first_floats(count - i);
        _mm512_mask_storeu_ps(to + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, to + i), factor));
    }
}

void normalize(const Normalization& c, uint8_t* const* buffers, int thread, int threads) {
    const Limits limits(c.inverse, c.zero, c.low, c.high);
    const int64_t size = c.kind == FLOAT ? 4 : 1, vectors = (c.channels + 15) / 16;
    const __mmask16 tail = first_floats(c.channels - 16 * (vectors - 1));
    float* row_of_numbers = c.softmax && c.kind != FLOAT ? (float*)scratch(4 * c.channels) : nullptr;
    auto part = [&](int64_t v) -> __mmask16 { return v + 1 < vectors ? (__mmask16)0xFFFF : tail; };
    for (int64_t row = c.rows * thread / threads; row < c.rows * (thread + 1) / threads; row++) {
        const float* from = (const float*)(buffers[c.source.buffer] + c.source.offset + row * c.source.pixel);
        uint8_t* to = buffers[c.result.buffer] + c.result.offset + row * c.result.pixel;
        if (c.softmax) {
            softmax(from, c.kind == FLOAT ? (float*)to : row_of_numbers, c.channels);
            if (c.kind != FLOAT) to_bytes(row_of_numbers, to, c.channels, limits);
            continue;
        }
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t v = 0; v < vectors; v++) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(part(v), from + 16 * v));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)c.channels);
        for (int64_t v = 0; v < vectors; v++) {
            const __m512 x = _mm512_maskz_sub_ps(part(v), _mm512_maskz_loadu_ps(part(v), from + 16 * v), mean);
            squares = _mm512_fmadd_ps(x, x, squares);
        }
        const float variance = _mm512_reduce_add_ps(squares) / (float)c.channels;
        const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(variance + (float)c.epsilon));
        auto value = [&](int64_t v) {
            const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(part(v), from + 16 * v), mean);
            return _mm512_fmadd_ps(_mm512_mul_ps(x, factor), _mm512_load_ps(c.scale + 16 * v),
                                   _mm512_load_ps(c.shift + 16 * v));
        };
        if (c.kind == FLOAT) {
            for (int64_t v = 0; v < vectors; v++) _mm512_mask_storeu_ps((float*)to + 16 * v, part(v), value(v));
            continue;
        }
        for (int64_t v = 0; v < vectors; v += 4) {
            __m512i q[4];
            UNROLL for (int i = 0; i < 4; i++)
                q[i] = v + i < vectors ? _mm512_cvtps_epi32(_mm512_mul_ps(value(v + i), limits.inverse))
                                       : _mm512_setzero_si512();
            store_bytes(to + 16 * v * size, in_order(narrow(q, limits.zero, limits.low, limits.high)),
                        c.channels - 16 * v);
        }
    }
}

// ------------------------------------------------------------------------------------------------------- products

constexpr int COLUMNS = 64;  // of the right matrix that are packed together

template <int MR>
INLINE void multiply_tile(const Product& c, const uint8_t* left, const float* packed, uint8_t* result, int64_t count) {
    __m512 sums[MR][4];
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int n = 0; n < 4; n++) sums[m][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < c.depth; k++, left += c.left_depth, packed += COLUMNS) {
        __m512 b[4];
        UNROLL for (int n = 0; n < 4; n++) b[n] = _mm512_load_ps(packed + 16 * n);
        UNROLL for (int m = 0; m < MR; m++) {
            const __m512 a = _mm512_set1_ps(*(const float*)(left + m * c.left_row));
            UNROLL for (int n = 0; n < 4; n++) sums[m][n] = _mm512_fmadd_ps(a, b[n], sums[m][n]);
        }
    }
    const __m512 factor = _mm512_set1_ps((float)c.factor);
    UNROLL for (int m = 0; m < MR; m++)
        UNROLL for (int n = 0; n < 4; n++)
            _mm512_mask_storeu_ps((float*)(result + m * c.result_row) + 16 * n, first_floats(count - 16 * n),
                                  _mm512_mul_ps(sums[m][n], factor));
}

void multiply(const Product& c, uint8_t* const* buffers, int thread, int threads) {
    const int64_t blocks = (c.columns + COLUMNS - 1) / COLUMNS, total = c.sizes[0] * c.sizes[1] * c.sizes[2] * blocks;
    float* packed = (float*)scratch(c.depth * COLUMNS * 4);
    for (int64_t work = total * thread / threads; work < total * (thread + 1) / threads; work++) {
        const int64_t block = work % blocks, outer = work / blocks;
        const int64_t index[3] = {outer / c.sizes[2] / c.sizes[1], outer / c.sizes[2] % c.sizes[1], outer % c.sizes[2]};
        const uint8_t* left = buffers[c.left.buffer] + c.left.offset;
        const uint8_t* right = buffers[c.right.buffer] + c.right.offset + block * COLUMNS * c.right_column;
        uint8_t* result = buffers[c.result.buffer] + c.result.offset + block * COLUMNS * 4;
        for (int i = 0; i < 3; i++) {
            left += index[i] * c.left_outer[i];
            right += index[i] * c.right_outer[i];
            result += index[i] * c.result_outer[i];
        }
        const int64_t count = std::min<int64_t>(COLUMNS, c.columns - block * COLUMNS);
        if (c.right_column == 4) {
            for (int64_t k = 0; k < c.depth; k++)
                UNROLL for (int n = 0; n < 4; n++)
                    _mm512_store_ps(packed + k * COLUMNS + 16 * n,
                                    _mm512_maskz_loadu_ps(first_floats(count - 16 * n),
                                                          (const float*)(right + k * c.right_depth) + 16 * n));
        } else {
            for (int64_t j = 0; j < COLUMNS; j++)
                for (int64_t k = 0; k < c.depth; k++)
                    packed[k * COLUMNS + j] =
                        j < count ? *(const float*)(right + k * c.right_depth + j * c.right_column) : 0.0f;
        }
        int64_t row = 0;
        for (; row + 6 <= c.rows; row += 6)
            multiply_tile<6>(c, left + row * c.left_row, packed, result + row * c.result_row, count);
        const uint8_t* last = left + row * c.left_row;
        uint8_t* to = result + row * c.result_row;
        switch (c.rows - row) {
            case 1: multiply_tile<1>(c, last, packed, to, count); break;
            case 2: multiply_tile<2>(c, last, packed, to, count); break;
            case 3: multiply_tile<3>(c, last, packed, to, count); break;
            case 4: multiply_tile<4>(c, last, packed, to, count); break;
            case 5: multiply_tile<5>(c, last, packed, to, count); break;
        }
    }
}

// ------------------------------------------------------------------------------------------------------ attention

// Where the parts of one head lie in a thread's scratch memory.
struct AttentionRoom {
    int64_t padded_depth, blocks, quads, chunks;  // blocks of 64 keys, groups of 4 keys, chunks of 64 features of a value
    int8_t *keys, *values;     // (blocks, depth / 4, 4, 64) and (chunks, quads, 4, 64)
    int32_t *shifts, *scores;  // of each key; (rows of a tile, keys)
    uint8_t *weights, *queries, *lines;
    int64_t wide;              // numbers of a row of scores and of weights

    explicit AttentionRoom(const Attention& c) {
        padded_depth = (c.depth + 63) / 64 * 64;
        blocks = (c.keys + 63) / 64;
        wide = 64 * blocks;
        quads = wide / 4;
        chunks = (c.width + 63) / 64;
        const int64_t key_bytes = wide * padded_depth, value_bytes = chunks * quads * 256;
        uint8_t* memory = scratch(key_bytes + value_bytes + 4 * wide + MR * (5 * wide + padded_depth) + 64 * padded_depth);
        keys = (int8_t*)memory;
        values = keys + key_bytes;
        shifts = (int32_t*)(values + value_bytes);
        scores = shifts + wide;
        weights = (uint8_t*)(scores + MR * wide);
        queries = weights + MR * wide;
        lines = queries + MR * padded_depth;
    }
    static constexpr int MR = 6;  // rows of a tile
};

// Real numbers to the bytes of a grid, with zeros behind the last one. Without `ordered` the bytes come as `narrow`
// leaves them.
INLINE void quantize_line(const float* from, int64_t count, uint8_t* to, const Limits& limits, bool ordered) {
    for (int64_t i = 0; i < count; i += 64) {
        __m512i q[4];
        UNROLL for (int v = 0; v < 4; v++)
            q[v] = to_integers(_mm512_mul_ps(_mm512_maskz_loadu_ps(first_floats(count - i - 16 * v), from + i + 16 * v),
                                             limits.inverse));
        __m512i bytes = in_order(narrow(q, limits.zero, limits.low, limits.high));
        bytes = _mm512_maskz_mov_epi8(first_bytes(count - i), bytes);
        _mm512_store_si512(to + i, ordered ? bytes : in_order(bytes));
    }
}

// Keys as bytes less 128, four features of 16 keys side by side; and for each key what the queries' zero point adds to
// its products, with the sign turned.
void pack_keys(const Attention& c, const AttentionRoom& room, const uint8_t* key) {
    const Limits limits(c.key_inverse, c.key_zero, c.key_low, c.key_high);
    const int64_t depth = room.padded_depth, fours = (c.depth + 3) / 4;
    for (int64_t first = 0; first < room.wide; first += 16) {
        const int64_t here = std::clamp<int64_t>(c.keys - first, 0, 16);
        for (int64_t j = 0; j < 16; j++) {
            if (j < here)
                quantize_line((const float*)(key + (first + j) * c.key_row), c.depth, room.lines + j * depth, limits, true);
            else
                std::memset(room.lines + j * depth, 128, depth);
        }
        int8_t* to = room.keys + first / 64 * fours * 256 + first % 64 * 4;
        __m512i sum = _mm512_setzero_si512();
        const __m512i places = _mm512_mullo_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)depth));
        for (int64_t k = 0; k < fours; k++, to += 256) {
            __m512i four = _mm512_i32gather_epi32(places, room.lines + 4 * k, 1);
            four = _mm512_xor_si512(four, _mm512_set1_epi8((char)128));
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), four);
            _mm512_store_si512(to, four);
        }
        // Behind the last feature, bytes of lines are zero and become -128; those of queries are zero there.
        const int64_t behind = 128 * (4 * fours - c.depth);
        sum = _mm512_add_epi32(sum, _mm512_set1_epi32((int)behind));
        _mm512_store_si512(room.shifts + first, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-(int)c.query_zero)));
    }
}

// Values as bytes less 128, of four keys side by side.
void pack_values(const Attention& c, const AttentionRoom& room, const uint8_t* value) {
    const Limits limits(c.value_inverse, c.value_zero, c.value_low, c.value_high);
    uint8_t* lines = room.lines;
    for (int64_t quad = 0; quad < room.quads; quad++) {
        for (int64_t chunk = 0; chunk < room.chunks; chunk++) {
            __m512i row[4], vector[4];
            UNROLL for (int j = 0; j < 4; j++) {
                const int64_t at = 4 * quad + j;
                if (at < c.keys) {
                    const int64_t count = std::min<int64_t>(64, c.width - 64 * chunk);
                    quantize_line((const float*)(value + at * c.value_row) + 64 * chunk, count, lines, limits, false);
                    row[j] = _mm512_xor_si512(_mm512_load_si512(lines), _mm512_set1_epi8((char)128));
                } else {
                    row[j] = _mm512_setzero_si512();
                }
            }
            interleave(row, vector);
            UNROLL for (int v = 0; v < 4; v++)
                _mm512_store_si512(room.values + (chunk * room.quads + quad) * 256 + 64 * v, vector[v]);
        }
    }
}

// Products of the bytes of MR rows with those of NB vectors of 16 columns, four at a time.
template <int MR, int NB>
INLINE void byte_tile(const uint8_t* left, int64_t left_row, const int8_t* right, int64_t fours,
                      const int32_t* start, int32_t* sums_of_rows, int64_t row) {
    __m512i sums[MR][NB];
    UNROLL for (int n = 0; n < NB; n++) {
        const __m512i first = start ? _mm512_load_si512(start + 16 * n) : _mm512_setzero_si512();
        UNROLL for (int m = 0; m < MR; m++) sums[m][n] = first;
    }
    for (int64_t k = 0; k < fours; k++, right += 256) {
        __m512i b[NB];
        UNROLL for (int n = 0; n < NB; n++) b[n] = _mm512_load_si512(right + 64 * n);
        UNROLL for (int m = 0; m < MR; m++) {
            int32_t four;
            std::memcpy(&four, left + m * left_row + 4 * k, 4);
            const __m512i a = _mm512_set1_epi32(four);
            UNROLL for (int n = 0; n < NB; n++) sums[m][n] = _mm512_dpbusd_epi32(sums[m][n], a, b[n]);
        }
    }
    UNROLL for (int m = 0; m < MR; m++)
        UNROLL for (int n = 0; n < NB; n++) _mm512_store_si512(sums_of_rows + m * row + 16 * n, sums[m][n]);
}

// The weights of a row from its scores, in steps of 1/255 of the largest one; returns their sum. `limit`: how many keys
// the row may look at. mask: null, or what is added to the scores of the row.
int32_t weigh(const Attention& c, int32_t* scores, uint8_t* weights, int64_t limit, int64_t wide, const uint8_t* mask,
              int32_t shift) {
    const __m512 factor = _mm512_set1_ps((float)c.factor);
    float* reals = (float*)scores;
    __m512 top = _mm512_set1_ps(-INFINITY);
    __m512i highest = _mm512_set1_epi32(INT32_MIN);
    for (int64_t j = 0; j < limit; j += 16) {
        const __mmask16 here = first_floats(limit - j);
        if (!mask) {
            highest = _mm512_mask_max_epi32(highest, here, highest, _mm512_load_si512(scores + j));
            continue;
        }
        __m512 x = _mm512_mul_ps(
            _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(scores + j), _mm512_set1_epi32(shift))), factor);
        if (c.mask_kind == FLOAT) {
            x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(here, (const float*)mask + j));
        } else {
            const __m128i open = _mm_maskz_loadu_epi8(here, mask + j);
            x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), _mm_test_epi8_mask(open, open), x);
        }
        top = _mm512_mask_max_ps(top, here, top, x);
        _mm512_store_ps(reals + j, x);
    }
    const __m512i most = _mm512_set1_epi32(_mm512_reduce_max_epi32(highest));
    float first = _mm512_reduce_max_ps(top);
    if (first == -INFINITY) first = 0.0f;
    const __m512 largest = _mm512_set1_ps(first), steps = _mm512_set1_ps(255.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t j = 0; j < wide; j += 64) {
        __m512i q[4];
        UNROLL for (int v = 0; v < 4; v++) {
            const int64_t at = j + 16 * v;
            const __mmask16 here = first_floats(limit - at);
            const __m512 x =
                mask ? _mm512_sub_ps(_mm512_load_ps(reals + at), largest)
                     : _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(scores + at), most)), factor);
            q[v] = _mm512_maskz_mov_epi32(here, _mm512_cvtps_epi32(_mm512_mul_ps(power(x), steps)));
            sum = _mm512_add_epi32(sum, q[v]);
        }
        _mm512_store_si512(weights + j, in_order(narrow(q, _mm512_setzero_si512(), _mm512_setzero_si512(),
                                                        _mm512_set1_epi8((char)255))));
    }
    return std::max(1, _mm512_reduce_add_epi32(sum));
}

// Up to MR queries of a head, from scores to results.
template <int MR>
void attend_tile(const Attention& c, const AttentionRoom& room, const Limits& queries, const Limits& results,
                 const uint8_t* query, uint8_t* result, const uint8_t* mask, int64_t row) {
    const int64_t depth = room.padded_depth, fours = (c.depth + 3) / 4;
    int32_t sums[MR], shifts[MR];
    UNROLL for (int m = 0; m < MR; m++) {
        uint8_t* line = room.queries + m * depth;
        quantize_line((const float*)(query + m * c.query_row), c.depth, line, queries, true);
        shifts[m] = 0;
        if (mask) {  // otherwise equal summands for all keys do not matter
            __m512i sum = _mm512_setzero_si512();
            for (int64_t i = 0; i < depth; i += 64)
                sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(line + i), _mm512_set1_epi8(1));
            const int64_t total = _mm512_reduce_add_epi32(sum) - c.depth * c.query_zero;
            shifts[m] = (int32_t)((c.key_zero - 128) * total);
        }
    }
    for (int64_t b = 0; b < room.blocks; b++)
        byte_tile<MR, 4>(room.queries, depth, room.keys + b * fours * 256, fours, room.shifts + 64 * b,
                         room.scores + 64 * b, room.wide);
    UNROLL for (int m = 0; m < MR; m++)
        sums[m] = weigh(c, room.scores + m * room.wide, room.weights + m * room.wide,
                        c.causal ? std::min(c.keys, row + m + 1) : c.keys, room.wide,
                        mask ? mask + m * c.mask_row : nullptr, shifts[m]);
    alignas(64) int32_t made[MR][64];
    for (int64_t chunk = 0; chunk < room.chunks; chunk++) {
        const int64_t count = std::min<int64_t>(64, c.width - 64 * chunk);
        const int8_t* values = room.values + chunk * room.quads * 256;
        const int64_t used = (c.keys + 3) / 4;
        switch ((count + 15) / 16) {
            case 4: byte_tile<MR, 4>(room.weights, room.wide, values, used, nullptr, made[0], 64); break;
            case 3: byte_tile<MR, 3>(room.weights, room.wide, values, used, nullptr, made[0], 64); break;
            case 2: byte_tile<MR, 2>(room.weights, room.wide, values, used, nullptr, made[0], 64); break;
            default: byte_tile<MR, 1>(room.weights, room.wide, values, used, nullptr, made[0], 64);
        }
        for (int m = 0; m < MR; m++) {
            const __m512 factor = _mm512_set1_ps((float)c.value_scale / (float)sums[m]);
            const __m512i zero = _mm512_set1_epi32((int)((c.value_zero - 128) * sums[m]));
            uint8_t* to = result + m * c.result_row;
            __m512i q[4];
            UNROLL for (int n = 0; n < 4; n++) {
                const __m512 y =
                    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(made[m] + 16 * n), zero)), factor);
                if (c.kind == FLOAT)
                    _mm512_mask_storeu_ps((float*)to + 64 * chunk + 16 * n, first_floats(count - 16 * n), y);
                q[n] = to_integers(_mm512_mul_ps(y, results.inverse));
            }
            if (c.kind != FLOAT)
                store_bytes(to + 64 * chunk, in_order(narrow(q, results.zero, results.low, results.high)), count);
        }
    }
}

// A head at a time: keys and values are packed once, and the queries follow tile by tile.
void attend(const Attention& c, uint8_t* const* buffers, int thread, int threads) {
    const AttentionRoom room(c);
    const Limits queries(c.query_inverse, c.query_zero, c.query_low, c.query_high);
    const Limits results(c.inverse, c.zero, c.low, c.high);
    const int64_t total = c.sizes[0] * c.sizes[1] * c.sizes[2], shared = c.sizes[2] / c.key_heads;
    int64_t packed = -1;
    for (int64_t work = total * thread / threads; work < total * (thread + 1) / threads; work++) {
        const int64_t head = work % c.sizes[2], window = work / c.sizes[2] % c.sizes[1];
        const int64_t image = work / c.sizes[2] / c.sizes[1];
        auto start = [&](const Place& place, const int64_t* outer, int64_t head_) {
            return buffers[place.buffer] + place.offset + image * outer[0] + window * outer[1] + head_ * outer[2];
        };
        const uint8_t* query = start(c.query, c.query_outer, head);
        const uint8_t* key = start(c.key, c.key_outer, head / shared);
        const uint8_t* value = start(c.value, c.value_outer, head / shared);
        uint8_t* result = start(c.result, c.result_outer, head);
        const uint8_t* mask = c.mask_kind == -1 ? nullptr : start(c.mask, c.mask_outer, head);
        if (packed != work / shared) {
            pack_keys(c, room, key);
            pack_values(c, room, value);
            packed = work / shared;
        }
        for (int64_t row = 0; row < c.rows; row += AttentionRoom::MR) {
            const uint8_t* from = query + row * c.query_row;
            uint8_t* to = result + row * c.result_row;
            const uint8_t* masks = mask ? mask + row * c.mask_row : nullptr;
            switch (std::min<int64_t>(AttentionRoom::MR, c.rows - row)) {
                case 6: attend_tile<6>(c, room, queries, results, from, to, masks, row); break;
                case 5: attend_tile<5>(c, room, queries, results, from, to, masks, row); break;
                case 4: attend_tile<4>(c, room, queries, results, from, to, masks, row); break;
                case 3: attend_tile<3>(c, room, queries, results, from, to, masks, row); break;
                case 2: attend_tile<2>(c, room, queries, results, from, to, masks, row); break;
                default: attend_tile<1>(c, room, queries, results, from, to, masks, row);
            }
        }
    }
}

// ----------------------------------------------------------------------------- linear layers with real numbers as input

// The grid of a row from its smallest and largest number, by the formulas of `quant/rows.py`, operation for operation.
struct RowGrid {
    float scale, inverse;
    int32_t zero;
    RowGrid(float low, float high, bool nan, int64_t first, int64_t last) {
        constexpr float largest = 1.70141173e38f, smallest_scale = 1e-18f;
        low = std::max(std::min(low, 0.0f), -largest);
        high = std::min(std::max(high, 0.0f), largest);
        scale = (high - low) / (float)(last - first);
        scale = nan ? NAN : scale == 0.0f ? 1.0f : std::max(scale, smallest_scale);
        inverse = 1.0f / scale;
        const float exact = std::nearbyintf((float)first - low / scale);
        zero = nan ? (int32_t)first : (int32_t)std::min(std::max(exact, (float)first), (float)last);
    }
};

void enter_rows(const RowEntrance& c, uint8_t* const* buffers, int thread, int threads) {
    for (int64_t row = c.rows * thread / threads; row < c.rows * (thread + 1) / threads; row++) {
        const float* from = (const float*)(buffers[c.source.buffer] + c.source.offset + row * c.source.pixel);
        __m512 low = _mm512_setzero_ps(), high = low;
        __mmask16 nan = 0;
        for (int64_t i = 0; i < c.channels; i += 16) {
            const __m512 x = _mm512_maskz_loadu_ps(first_floats(c.channels - i), from + i);
            low = _mm512_min_ps(x, low);
            high = _mm512_max_ps(x, high);
            nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        }
        const RowGrid grid(_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), nan != 0, c.low, c.high);
        *(float*)(buffers[c.scales.buffer] + c.scales.offset + row * c.scales.pixel) = grid.scale;
        *(int32_t*)(buffers[c.zeros.buffer] + c.zeros.offset + row * c.zeros.pixel) = grid.zero;
        to_bytes(from, buffers[c.result.buffer] + c.result.offset + row * c.result.pixel, c.channels,
                 Limits(grid.inverse, grid.zero, c.low, c.high));
    }
}

// Scale, bias, residual, activation and storing of the products of one row with NB vectors of channels.
template <int NB>
void finish_row(const Finish& f, const Limits& limits, const float* products, float factor, int64_t channel,
                int64_t count, uint8_t* result, const uint8_t* residual) {
    __m512 y[4];
    UNROLL for (int n = 0; n < 4; n++) {
        y[n] = _mm512_setzero_ps();
        if (n >= NB) continue;
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(f.scale + channel + 16 * n), _mm512_set1_ps(factor));
        y[n] = _mm512_fmadd_ps(_mm512_load_ps(products + 16 * n), scale, _mm512_loadu_ps(f.bias + channel + 16 * n));
        if (residual)
            y[n] = _mm512_add_ps(y[n], residual_numbers(f, residual, channel + 16 * n, first_floats(count - 16 * n)));
        if (f.activation != NONE) y[n] = activate(y[n], f.activation, (float)f.argument0, (float)f.argument1);
        if (f.kind == FLOAT)
            _mm512_mask_storeu_ps((float*)result + channel + 16 * n, first_floats(count - 16 * n), y[n]);
    }
    if (f.kind == FLOAT) return;
    __m512i q[4];
    UNROLL for (int n = 0; n < 4; n++) q[n] = to_integers(_mm512_mul_ps(y[n], limits.inverse));
    store_bytes(result + channel, in_order(narrow(q, limits.zero, limits.low, limits.high)),
                std::min<int64_t>(count, 16 * NB));
}

// Where a tile of rows lies, and the numbers of these rows.
struct RowTile {
    const uint8_t* source[14];
    uint8_t* result[14];
    const uint8_t* residual[14];
    float scale[14];
    int32_t zero[14];
};

template <int MR, int NB>
__attribute__((noinline)) void row_tile(const RowLinear& c, const RowTile& at, const int8_t* weights,
                                        const Limits& limits, int64_t channel, int64_t count) {
    __m512i sums[MR][NB];
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int n = 0; n < NB; n++) sums[m][n] = _mm512_setzero_si512();
    const uint8_t* p[MR];
    UNROLL for (int m = 0; m < MR; m++) p[m] = at.source[m];
    for (int64_t k = 0; k < c.run; k += 4, weights += 64 * NB) {
        __m512i w[NB];
        UNROLL for (int n = 0; n < NB; n++) w[n] = _mm512_load_si512(weights + 64 * n);
        UNROLL for (int m = 0; m < MR; m++) {
            int32_t four;
            std::memcpy(&four, p[m] + k, 4);
            const __m512i x = _mm512_set1_epi32(four);
            UNROLL for (int n = 0; n < NB; n++) sums[m][n] = _mm512_dpbusd_epi32(sums[m][n], x, w[n]);
        }
    }
    alignas(64) float made[MR][16 * NB];
    UNROLL for (int m = 0; m < MR; m++) {
        const __m512i zero = _mm512_set1_epi32(at.zero[m]);
        UNROLL for (int n = 0; n < NB; n++) {
            const __m512i shift = _mm512_mullo_epi32(zero, _mm512_load_si512(c.sums + channel + 16 * n));
            _mm512_store_ps(made[m] + 16 * n, _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[m][n], shift)));
        }
    }
    for (int m = 0; m < MR; m++)
        finish_row<NB>(c.finish, limits, made[m], at.scale[m], channel, count, at.result[m], at.residual[m]);
}

template <int MR, int NB>
__attribute__((noinline)) void row_tile(const WeightLinear& c, const RowTile& at, const int8_t* weights,
                                        const Limits& limits, int64_t channel, int64_t count) {
    constexpr int CHAINS = MR * NB < 8 ? 2 : 1;  // of sums: few of them would wait for each other
    __m512 sums[CHAINS][MR][NB];
    UNROLL for (int i = 0; i < CHAINS; i++)
        UNROLL for (int m = 0; m < MR; m++) UNROLL for (int n = 0; n < NB; n++) sums[i][m][n] = _mm512_setzero_ps();
    const float* p[MR];
    UNROLL for (int m = 0; m < MR; m++) p[m] = (const float*)at.source[m];
    auto add = [&](int64_t k, __m512 (*to)[NB]) __attribute__((always_inline)) {
        __m512 w[NB];
        UNROLL for (int n = 0; n < NB; n++)
            w[n] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i*)(weights + k * 16 * NB) + n)));
        UNROLL for (int m = 0; m < MR; m++) {
            const __m512 x = _mm512_set1_ps(p[m][k]);
            UNROLL for (int n = 0; n < NB; n++) to[m][n] = _mm512_fmadd_ps(x, w[n], to[m][n]);
        }
    };
    int64_t k = 0;
    for (; k + CHAINS <= c.depth; k += CHAINS) UNROLL for (int i = 0; i < CHAINS; i++) add(k + i, sums[i]);
    for (; k < c.depth; k++) add(k, sums[0]);
    alignas(64) float made[MR][16 * NB];
    UNROLL for (int m = 0; m < MR; m++)
        UNROLL for (int n = 0; n < NB; n++)
            _mm512_store_ps(made[m] + 16 * n,
                            CHAINS == 1 ? sums[0][m][n] : _mm512_add_ps(sums[0][m][n], sums[CHAINS - 1][m][n]));
    for (int m = 0; m < MR; m++)
        finish_row<NB>(c.finish, limits, made[m], 1.0f, channel, count, at.result[m], at.residual[m]);
}

template <int NB, class Step>
void row_tiles(const Step& c, int rows, const RowTile& at, const int8_t* weights, const Limits& limits, int64_t channel,
               int64_t count) {
    switch (rows) {
#define CASE(MR) \
    case MR: \
        if constexpr (MR * NB <= 24) row_tile<MR, NB>(c, at, weights, limits, channel, count); \
        return
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
        CASE(13); CASE(14);
#undef CASE
    }
}

INLINE void take_numbers(const RowLinear& c, uint8_t* const* buffers, int64_t row, int m, RowTile& at) {
    at.scale[m] = *(const float*)(buffers[c.scales.buffer] + c.scales.offset + row * c.scales.pixel);
    at.zero[m] = *(const int32_t*)(buffers[c.zeros.buffer] + c.zeros.offset + row * c.zeros.pixel);
}
INLINE void take_numbers(const WeightLinear&, uint8_t* const*, int64_t, int, RowTile&) {}

// Threads share the blocks of channels, so that each reads its weights once; of the block between two, they share the
// tiles of rows. run: bytes of an output channel's weights.
template <class Step>
void multiply_rows(const Step& c, int64_t run, uint8_t* const* buffers, int thread, int threads) {
    const Finish& f = c.finish;
    const Limits limits(f.inverse, f.zero, f.low, f.high);
    const int64_t vectors = (c.channels + 15) / 16, blocks = (vectors + 3) / 4;
    const int64_t tall = TILE[(vectors + blocks - 1) / blocks], tiles = (c.rows + tall - 1) / tall;
    const int64_t total = blocks * tiles;
    for (int64_t work = total * thread / threads; work < total * (thread + 1) / threads; work++) {
        const int64_t b = work / tiles, t = work % tiles;
        const int64_t vector = vectors / blocks * b + std::min(b, vectors % blocks);
        const int64_t from = c.rows * t / tiles;
        const int rows = (int)(c.rows * (t + 1) / tiles - from);
        RowTile at;
        for (int m = 0; m < rows; m++) {
            const int64_t row = from + m;
            at.source[m] = buffers[c.source.buffer] + c.source.offset + row * c.source.pixel;
            at.result[m] = buffers[c.result.buffer] + c.result.offset + row * c.result.pixel;
            at.residual[m] = nullptr;
            if (f.residual_kind != -1)
                at.residual[m] = buffers[f.residual.buffer] + f.residual.offset + row * f.residual.pixel;
            take_numbers(c, buffers, row, m, at);
        }
        const int8_t* weights = c.weights + vector * run * 16;
        const int64_t channel = 16 * vector, count = c.channels - channel;
        switch (vectors / blocks + (b < vectors % blocks)) {
            case 4: row_tiles<4>(c, rows, at, weights, limits, channel, count); break;
            case 3: row_tiles<3>(c, rows, at, weights, limits, channel, count); break;
            case 2: row_tiles<2>(c, rows, at, weights, limits, channel, count); break;
            default: row_tiles<1>(c, rows, at, weights, limits, channel, count);
        }
    }
}

// Steps take a few microseconds, so that threads wait for each other awake; where there are more threads than cores,
// one that waits for long makes room.
struct Barrier {
    std::atomic<int64_t> arrived{0};

    void wait(int threads, int64_t times) {
        const int64_t all = times * threads;
        arrived.fetch_add(1, std::memory_order_acq_rel);
        for (int64_t turns = 0; arrived.load(std::memory_order_acquire) < all; turns++) {
            if (turns < 20000)
                _mm_pause();
            else
                sched_yield();
        }
    }
};

void execute(const int64_t* step, uint8_t* const* buffers, int thread, int threads) {
    switch (*step) {
        case CONVOLUTION: return convolve(*(const Convolution*)step, buffers, thread, threads);
        case DEPTHWISE: return convolve_depthwise(*(const Depthwise*)step, buffers, thread, threads);
        case POOLING: return pool(*(const Pooling*)step, buffers, thread, threads);
        case ENTRANCE: return enter(*(const Entrance*)step, buffers, thread, threads);
        case COPY: return copy(*(const Copy*)step, buffers, thread, threads);
        case FILL: return fill(*(const Fill*)step, buffers, thread, threads);
        case POINTWISE: return pointwise(*(const Pointwise*)step, buffers, thread, threads);
        case NORMALIZATION: return normalize(*(const Normalization*)step, buffers, thread, threads);
        case PRODUCT: return multiply(*(const Product*)step, buffers, thread, threads);
        case AFFINE: return affine(*(const Affine*)step, buffers, thread, threads);
        case ATTENTION: return attend(*(const Attention*)step, buffers, thread, threads);
        case ROW_ENTRANCE: return enter_rows(*(const RowEntrance*)step, buffers, thread, threads);
        case ROW_LINEAR: {
            const RowLinear& c = *(const RowLinear*)step;
            return multiply_rows(c, c.run, buffers, thread, threads);
        }
        case WEIGHT_LINEAR: {
            const WeightLinear& c = *(const WeightLinear*)step;
            return multiply_rows(c, c.depth, buffers, thread, threads);
        }
    }
}

}  // namespace

extern "C" {

// Bytes of each kind of step, for the other side to compare with its own.
int64_t fxc_size(int64_t op) {
    switch (op) {
        case CONVOLUTION: return sizeof(Convolution);
        case DEPTHWISE: return sizeof(Depthwise);
        case POOLING: return sizeof(Pooling);
        case ENTRANCE: return sizeof(Entrance);
        case COPY: return sizeof(Copy);
        case FILL: return sizeof(Fill);
        case POINTWISE: return sizeof(Pointwise);
        case NORMALIZATION: return sizeof(Normalization);
        case PRODUCT: return sizeof(Product);
        case AFFINE: return sizeof(Affine);
        case ATTENTION: return sizeof(Attention);
        case ROW_ENTRANCE: return sizeof(RowEntrance);
        case ROW_LINEAR: return sizeof(RowLinear);
        case WEIGHT_LINEAR: return sizeof(WeightLinear);
    }
    return 0;
}

// Runs a plan for one image on each of several: every thread has images and memory of its own, and waits for nobody.
// buffers: one table for each thread. moving: numbers of the buffers that hold all images, which lie at bases[i] and
// `strides[i]` bytes apart.
void fxc_run_each(const int64_t* const* steps, int64_t count, uint8_t** const* buffers, int64_t images, int64_t movings,
                  const int64_t* moving, uint8_t* const* bases, const int64_t* strides, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), all = omp_get_num_threads();
        uint8_t** own = buffers[thread];
        for (int64_t image = images * thread / all; image < images * (thread + 1) / all; image++) {
            for (int64_t i = 0; i < movings; i++) own[moving[i]] = bases[i] + image * strides[i];
            for (int64_t i = 0; i < count; i++) execute(steps[i], own, 0, 1);
        }
    }
}

void fxc_run(const int64_t* const* steps, int64_t count, uint8_t* const* buffers, int64_t threads) {
    if (threads == 1) {
        for (int64_t i = 0; i < count; i++) execute(steps[i], buffers, 0, 1);
        return;
    }
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t i = 0; i < count; i++) {
            execute(steps[i], buffers, thread, all);
            if (i + 1 < count) barrier.wait(all, i + 1);
        }
    }
}
}
