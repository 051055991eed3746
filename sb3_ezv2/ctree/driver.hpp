// What a search does in each simulation besides the model's step, in one walk over the roots: candidates of the new states,
// the states into their pool, backup and selection in the tree, and the rows that the next step begins with.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "sampling.hpp"
#include "tree.hpp"

namespace ezv2 {

// Arrays of one batch of B searches, all of them the caller's.
struct Pools {
    float* states;        // [(S + 1) * B, width], row slot * B + root
    size_t width;         // floats of a state
    float* leaf_states;   // [B, width], what the model's step begins with
    float* actions;       // [B * K + S * B * M, dims], see Tree::select; nullptr if the actions are discrete
    float* leaf_actions;  // [B, dims]
    const float* noise;   // [S, B, M, dims], or [S, 1, M, dims] if shared; standard normal
    bool shared_noise;
    int dims;
    float limit;  // actions are clipped to +-limit
};

class Driver {
public:
    // tree: after reset() and select(). parent, edge: what it selected, and where it will write.
    Driver(Tree& tree, const Pools& pools, int64_t* parent, int64_t* action, int64_t* edge, int level)
        : tree_(tree), pools_(pools), parent_(parent), action_(action), edge_(edge), sample_(sample_function(level)) {
        gather(0, tree_.B);
    }

    // new_states: [B, width]; reward, value: [B]; policy: [B, 2 * dims], or [B, M] logits if the actions are discrete. `last`:
    // nothing follows, so that neither states nor candidates are needed.
    void step(const float* new_states, const float* reward, const float* value, const float* policy, bool last) {
        const size_t each = size_t(kSampleRows) * 2 * pools_.dims;
        scratch_.resize(each * tree_.threads());
        tree_.over_roots([&](int begin, int end, int part, double* scratch) {
            const float* logits = pools_.actions == nullptr ? policy : nullptr;
            if (last) return tree_.backup(begin, end, end, reward, value, logits);
            for (int first = begin; first < end; first += kBlock) {
                const int next = std::min(first + kBlock, end);
                if (pools_.actions != nullptr) sample(first, next, policy, &scratch_[part * each]);
                std::memcpy(pools_.states + (size_t(tree_.simulation + 1) * tree_.B + first) * pools_.width,
                            new_states + first * pools_.width, (next - first) * pools_.width * sizeof(float));
                tree_.backup(first, next, end, reward, value, logits);
                tree_.select(first, next, tree_.simulation + 1, scratch, parent_, action_, edge_);
                gather(first, next);
            }
        });
        ++tree_.simulation;
    }

private:
    void sample(int first, int next, const float* policy, float* scratch) const {
        const size_t B = tree_.B, M = tree_.M, dims = pools_.dims, simulation = tree_.simulation;
        const float* noise = pools_.noise + (pools_.shared_noise ? simulation : simulation * B + first) * M * dims;
        float* out = pools_.actions + (B * tree_.K + (simulation * B + first) * M) * dims;
        sample_(policy + size_t(first) * 2 * dims, next - first, pools_.dims, tree_.M, noise, pools_.shared_noise, pools_.limit,
                scratch, out);
    }

    void gather(int first, int next) {
        const size_t width = pools_.width, dims = pools_.dims;
        for (int b = first; b < next; ++b) {
            if (b + 2 < next) {
                const float* row = pools_.states + parent_[b + 2] * width;
                for (size_t i = 0; i < std::min(width, size_t(256)); i += 16) fetch(row + i);
            }
            std::memcpy(pools_.leaf_states + b * width, pools_.states + parent_[b] * width, width * sizeof(float));
        }
        if (pools_.actions == nullptr) return;
        for (int b = first; b < next; ++b) {
            const float* row = pools_.actions + edge_[b] * dims;
            for (size_t d = 0; d < dims; ++d) pools_.leaf_actions[b * dims + d] = row[d];
        }
    }

    Tree& tree_;
    const Pools pools_;
    int64_t *const parent_, *const action_, *const edge_;
    const SampleFunction sample_;
    std::vector<float> scratch_;  // [threads, kSampleRows, 2 * dims]
};

}  // namespace ezv2
