// The state model of EfficientZero V2 App. G for a few rows at a time: one step of it takes less time than a tensor library
// takes to be called. The arithmetic is that of sb3_ezv2/networks.py, with batch norm folded into the linear layers.
//
// Weights are packed in tiles of 64 outputs, in the order in which they are read: with few rows their way from the cache is
// what takes the time. A row's result does not depend on the other rows. The kernels are compiled for several instruction
// sets and chosen at run time; on compilers without these extensions plain loops serve.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.hpp"

namespace ezv2 {

constexpr int kLanes = 16;  // partial sums of a layer norm
constexpr int kTile = 64;   // outputs of a packed tile
constexpr int kRows = 16;   // rows that share a pass over the weights

// Lanes floats. A type that is wider than the instruction set's registers would live in memory: each has its own.
#if defined(__GNUC__)
template <int Lanes>
struct VectorOf {
    typedef float type __attribute__((vector_size(Lanes * sizeof(float)), aligned(4), may_alias));
};
#else
template <int Lanes>
struct VectorOf {
    struct type {
        float x[Lanes];
        type operator*(float b) const {
            type out;
            for (int i = 0; i < Lanes; ++i) out.x[i] = x[i] * b;
            return out;
        }
        type& operator+=(const type& b) {
            for (int i = 0; i < Lanes; ++i) x[i] += b.x[i];
            return *this;
        }
    };
};
#endif

inline int padded(int width) { return (width + kTile - 1) / kTile * kTile; }

// y = W x + b. Packed: [tile][in][64], the outputs past the last one are 0.
struct Linear {
    int in = 0, out = 0;
    std::vector<float> weight, bias;

    // weight: [out, in] as PyTorch has it.
    void pack(const float* w, const float* b, int out_width, int in_width) {
        in = in_width;
        out = out_width;
        weight.assign(size_t(padded(out)) * in, 0.0f);
        bias.assign(padded(out), 0.0f);
        std::copy_n(b, out, bias.begin());
        for (int o = 0; o < out; ++o) {
            for (int i = 0; i < in; ++i) {
                weight[(size_t(o / kTile) * in + i) * kTile + o % kTile] = w[size_t(o) * in + i];
            }
        }
    }
};

// Scale and shift after normalisation to mean 0 and variance 1.
struct Norm {
    int width = 0;
    std::vector<float> scale, shift;

    void pack(const float* s, const float* b, int n) {
        width = n;
        scale.assign(s, s + n);
        shift.assign(b, b + n);
    }
};

// x + W2 relu(W1 LN(x))
struct Block {
    Norm norm;
    Linear first, second;
};

struct Head {
    Block block;
    Norm norm;
    std::vector<Linear> layers;  // ReLU between
};

// Bins of a categorical scalar: see CategoricalSupport.
struct Support {
    std::vector<float> bins;
    float scale = 1.0f;
    bool inverse_h = false;
};

// The outputs of one tile for a few rows. x: [Rows, x_stride], y: [Rows, y_stride] of padded widths. Rows * Vectors sums are kept
// at once: as many as hide the latency of an addition and leave registers for the weights.
template <int Lanes, int Rows, int Vectors>
EZV2_INLINE void tile_rows(const Linear& layer, int tile, const float* x, int x_stride, float* y, int y_stride, bool relu) {
    using Vector = typename VectorOf<Lanes>::type;
    for (int part = 0; part < kTile / Lanes; part += Vectors) {
        const int column = tile * kTile + part * Lanes;
        if (column >= layer.out) break;
        Vector sum[Rows][Vectors];
        for (int v = 0; v < Vectors; ++v) {
            Vector b;
            std::memcpy(&b, &layer.bias[column + v * Lanes], sizeof b);
            for (int r = 0; r < Rows; ++r) sum[r][v] = b;
        }
        const float* w = &layer.weight[size_t(tile) * layer.in * kTile + part * Lanes];
        for (int i = 0; i < layer.in; ++i, w += kTile) {
            for (int v = 0; v < Vectors; ++v) {
                Vector weight;
                std::memcpy(&weight, w + v * Lanes, sizeof weight);
                for (int r = 0; r < Rows; ++r) sum[r][v] += weight * x[r * x_stride + i];
            }
        }
        for (int r = 0; r < Rows; ++r) {
            for (int v = 0; v < Vectors; ++v) {
                std::memcpy(y + r * y_stride + column + v * Lanes, &sum[r][v], sizeof(Vector));
            }
        }
    }
    if (relu) {
        for (int r = 0; r < Rows; ++r) {
            float* of_row = y + r * y_stride + tile * kTile;
            for (int o = 0; o < kTile; ++o) of_row[o] = of_row[o] < 0.0f ? 0.0f : of_row[o];
        }
    }
}

// All rows of one tile before the next: its weights then come from the nearest cache. One to three rows need other numbers of
// vectors to have enough sums.
template <int Lanes, int OfFour, int OfThree, int OfTwo, int OfOne>
EZV2_INLINE void linear_rows(const Linear& layer, int rows, const float* x, int xs, float* y, int ys, bool relu) {
    const int tiles = padded(layer.out) / kTile;
    for (int tile = 0; tile < tiles; ++tile) {
        int row = 0;
        for (; row + 4 <= rows; row += 4) tile_rows<Lanes, 4, OfFour>(layer, tile, x + row * xs, xs, y + row * ys, ys, relu);
        switch (rows - row) {
            case 3: tile_rows<Lanes, 3, OfThree>(layer, tile, x + row * xs, xs, y + row * ys, ys, relu); break;
            case 2: tile_rows<Lanes, 2, OfTwo>(layer, tile, x + row * xs, xs, y + row * ys, ys, relu); break;
            case 1: tile_rows<Lanes, 1, OfOne>(layer, tile, x + row * xs, xs, y + row * ys, ys, relu); break;
            default: break;
        }
    }
}

using LinearFunction = void (*)(const Linear&, int, const float*, int, float*, int, bool);

inline void linear_plain(const Linear& layer, int rows, const float* x, int xs, float* y, int ys, bool relu) {
    linear_rows<4, 2, 2, 4, 8>(layer, rows, x, xs, y, ys, relu);
}

#if EZV2_X86
EZV2_AVX2 inline void linear_avx2(const Linear& layer, int rows, const float* x, int xs, float* y, int ys, bool relu) {
    linear_rows<8, 2, 2, 4, 8>(layer, rows, x, xs, y, ys, relu);
}

EZV2_AVX512 inline void linear_avx512(const Linear& layer, int rows, const float* x, int xs, float* y, int ys, bool relu) {
    linear_rows<16, 4, 4, 4, 4>(layer, rows, x, xs, y, ys, relu);
}
#endif

inline LinearFunction linear_function(int level) {
#if EZV2_X86
    if (level >= 2 && has_avx512()) return linear_avx512;
    if (level >= 1 && has_avx2()) return linear_avx2;
#endif
    (void)level;
    return linear_plain;
}

class Mlp {
public:
    // What the model consists of, filled in by the caller before the first step.
    bool discrete = false;
    int features = 0, state_dim = 0, action_dim = 0, hidden = 0;
    std::vector<float> feature_mean, feature_std_inverse;
    Linear represent;
    Norm represent_norm;
    std::vector<Block> represent_blocks;
    Linear embedding;
    Norm embedding_norm;
    Norm joint_norm;
    Linear joint_first, joint_second;
    std::vector<Block> dynamics_blocks;
    Head reward_head, value_head, policy_head;
    Support reward_support, value_support;

    // level: 2 all that the processor has, 1 up to AVX2, 0 plain. Widths must be set before.
    void allocate(int level) {
        linear_ = linear_function(level);
        int widest = std::max(padded(features), padded(state_dim + embedding.out));
        for (const Head* head : {&reward_head, &value_head, &policy_head}) {
            widest = std::max(widest, padded(head->block.first.out));
            for (const Linear& layer : head->layers) widest = std::max(widest, padded(layer.out));
        }
        for (const auto* blocks : {&represent_blocks, &dynamics_blocks}) {
            for (const Block& block : *blocks) widest = std::max(widest, padded(block.first.out));
        }
        widest = std::max({widest, padded(joint_first.out), padded(joint_second.out), padded(represent.out)});
        stride_ = widest;
        buffer_.assign(size_t(kBuffers) * kRows * stride_, 0.0f);
    }

    // H. x: [rows, features] raw features. state: [rows, state_dim], value: [rows], policy: [rows, outputs].
    void initial(int rows, const float* x, float* state, float* value, float* policy) {
        for (int first = 0; first < rows; first += kRows) {
            const int n = std::min(kRows, rows - first);
            float *a = buffer(0), *b = buffer(1);
            for (int r = 0; r < n; ++r) {
                for (int f = 0; f < features; ++f) {
                    const float z = (x[size_t(first + r) * features + f] - feature_mean[f]) * feature_std_inverse[f];
                    a[r * stride_ + f] = z < -10.0f ? -10.0f : z > 10.0f ? 10.0f : z;
                }
            }
            linear_(represent, n, a, stride_, b, stride_, false);
            normalise(represent_norm, n, b, b, false);
            for (int r = 0; r < n; ++r) {
                for (int d = 0; d < state_dim; ++d) b[r * stride_ + d] = std::tanh(b[r * stride_ + d]);
            }
            for (const Block& block : represent_blocks) residual(block, n, b);
            for (int r = 0; r < n; ++r) std::copy_n(b + r * stride_, state_dim, state + size_t(first + r) * state_dim);
            scalar(value_head, value_support, n, b, value + first);
            outputs(n, b, policy + size_t(first) * policy_head.layers.back().out);
        }
    }

    // G, R, V, P. states: [*, state_dim], of which `parent` names the rows; action: int64 [rows] if discrete, else actions
    // [*, action_dim], of which `action` names the rows. Writes new_state [rows, state_dim], reward [rows], value [rows] and
    // policy [rows, outputs].
    void step(int rows, const float* states, const int64_t* parent, const float* actions, const int64_t* action,
              float* new_state, float* reward, float* value, float* policy) {
        const int embedded = embedding.out;
        for (int first = 0; first < rows; first += kRows) {
            const int n = std::min(kRows, rows - first);
            float *a = buffer(0), *b = buffer(1), *x = buffer(2);
            for (int r = 0; r < n; ++r) {
                const float* state = states + size_t(parent[first + r]) * state_dim;
                std::copy_n(state, state_dim, x + r * stride_);
                if (discrete) {
                    std::fill_n(a + r * stride_, action_dim, 0.0f);
                    a[r * stride_ + action[first + r]] = 1.0f;
                } else {
                    std::copy_n(actions + size_t(action[first + r]) * action_dim, action_dim, a + r * stride_);
                }
            }
            linear_(embedding, n, a, stride_, b, stride_, false);
            normalise(embedding_norm, n, b, b, true);
            for (int r = 0; r < n; ++r) {
                std::copy_n(x + r * stride_, state_dim, a + r * stride_);
                std::copy_n(b + r * stride_, embedded, a + r * stride_ + state_dim);
            }
            normalise(joint_norm, n, a, a, false);
            linear_(joint_first, n, a, stride_, b, stride_, true);
            linear_(joint_second, n, b, stride_, a, stride_, false);
            add(n, a, x);
            for (const Block& block : dynamics_blocks) residual(block, n, x);
            for (int r = 0; r < n; ++r) std::copy_n(x + r * stride_, state_dim, new_state + size_t(first + r) * state_dim);
            scalar(reward_head, reward_support, n, x, reward + first);
            scalar(value_head, value_support, n, x, value + first);
            outputs(n, x, policy + size_t(first) * policy_head.layers.back().out);
        }
    }

private:
    static constexpr int kBuffers = 6;

    float* buffer(int i) { return &buffer_[size_t(i) * kRows * stride_]; }

    void add(int n, const float* x, float* to) const {
        for (int r = 0; r < n; ++r) {
            for (int d = 0; d < state_dim; ++d) to[r * stride_ + d] += x[r * stride_ + d];
        }
    }

    // LayerNorm, eps 1e-5
    void normalise(const Norm& norm, int n, const float* x, float* y, bool relu) const {
        for (int r = 0; r < n; ++r, x += stride_, y += stride_) {
            const float mean = sum(x, norm.width, 0.0f, false) / norm.width;
            const float var = sum(x, norm.width, mean, true) / norm.width;
            const float factor = 1.0f / std::sqrt(var + 1e-5f);
            for (int i = 0; i < norm.width; ++i) y[i] = (x[i] - mean) * factor * norm.scale[i] + norm.shift[i];
            if (relu) {
                for (int i = 0; i < norm.width; ++i) y[i] = y[i] < 0.0f ? 0.0f : y[i];
            }
        }
    }

    // Sum of x - mean, or of its squares, in partial sums that compilers vectorise.
    static float sum(const float* x, int width, float mean, bool squares) {
        float part[kLanes] = {};
        int i = 0;
        if (squares) {
            for (; i + kLanes <= width; i += kLanes) {
                for (int l = 0; l < kLanes; ++l) part[l] += (x[i + l] - mean) * (x[i + l] - mean);
            }
            for (int l = 0; i < width; ++i, ++l) part[l] += (x[i] - mean) * (x[i] - mean);
        } else {
            for (; i + kLanes <= width; i += kLanes) {
                for (int l = 0; l < kLanes; ++l) part[l] += x[i + l];
            }
            for (int l = 0; i < width; ++i, ++l) part[l] += x[i];
        }
        for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int l = 0; l < half; ++l) part[l] += part[l + half];
        }
        return part[0];
    }

    // In place; uses buffers 3 and 4.
    void residual(const Block& block, int n, float* x) {
        float *a = buffer(3), *b = buffer(4);
        normalise(block.norm, n, x, a, false);
        linear_(block.first, n, a, stride_, b, stride_, true);
        linear_(block.second, n, b, stride_, a, stride_, false);
        add(n, a, x);
    }

    // Output of a head, in buffer 3 or 4.
    const float* run_head(const Head& head, int n, const float* state) {
        float* x = buffer(5);
        for (int r = 0; r < n; ++r) std::copy_n(state + r * stride_, state_dim, x + r * stride_);
        residual(head.block, n, x);
        float *a = buffer(3), *b = buffer(4);
        normalise(head.norm, n, x, a, false);
        for (size_t i = 0; i < head.layers.size(); ++i) {
            linear_(head.layers[i], n, a, stride_, b, stride_, i + 1 < head.layers.size());
            std::swap(a, b);
        }
        return a;
    }

    void scalar(const Head& head, const Support& support, int n, const float* state, float* out) {
        const float* logits = run_head(head, n, state);
        const int bins = int(support.bins.size()), half = bins / 2;
        float* weight = buffer(5);
        for (int r = 0; r < n; ++r, logits += stride_) {
            const float top = *std::max_element(logits, logits + bins);
            for (int i = 0; i < bins; ++i) weight[i] = std::max(logits[i] - top, -87.0f);
            for (int i = 0; i < bins; ++i) weight[i] = exp_float(weight[i]);
            double total = weight[half], x = 0.0;
            // Pairs of bins first: equal logits give exactly 0
            for (int i = 1; i <= half; ++i) {
                total += double(weight[half + i]) + weight[half - i];
                x += (double(weight[half + i]) - weight[half - i]) * support.bins[half + i];
            }
            x /= total;
            if (support.inverse_h) {
                const double eps = 0.001;
                const double root = (std::sqrt(1.0 + 4.0 * eps * (std::abs(x) + 1.0 + eps)) - 1.0) / (2.0 * eps);
                x = x == 0.0 ? 0.0 : std::copysign(root * root - 1.0, x);
            }
            out[r] = static_cast<float>(x * support.scale);
        }
    }

    void outputs(int n, const float* state, float* out) {
        const int width = policy_head.layers.back().out;
        const float* logits = run_head(policy_head, n, state);
        for (int r = 0; r < n; ++r) std::copy_n(logits + r * stride_, width, out + size_t(r) * width);
    }

    LinearFunction linear_ = linear_plain;
    int stride_ = 0;
    std::vector<float> buffer_;  // [kBuffers, kRows, stride]
};

}  // namespace ezv2
