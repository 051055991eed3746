// Batched Gumbel search trees in flat arrays.
//
// A node slot is (root, simulation): slot 0 is the root, simulation s creates slot s + 1. Storage is root-major, so
// that one search touches one contiguous piece of every array. Roots are independent of each other: they can be
// split over threads in any way without changing a result.
//
// Sources: Danihelka et al. 2022 (Gumbel MuZero: root selection, completed Q, inner selection), EfficientZero
// Eq. 10 (soft min-max bounds), EfficientZero V2 Eq. 18-19 (policy target), Eq. 10-11 (search-based value).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

namespace ezv2 {

// Below this many roots per thread, starting a thread costs more than it saves.
constexpr int kMinRootsPerThread = 256;

// Sequential halving: among the considered actions, the one to visit at simulation s has `schedule[s]` visits so far.
inline std::vector<int32_t> considered_visits(int num_considered, int num_simulations) {
    std::vector<int32_t> schedule;
    schedule.reserve(num_simulations);
    if (num_considered <= 1) {
        for (int s = 0; s < num_simulations; ++s) schedule.push_back(s);
        return schedule;
    }
    int phases = 0;
    while ((int64_t(1) << phases) < num_considered) ++phases;
    int considered = num_considered;
    int32_t visits = 0;  // the actions still considered all have this many visits
    while (static_cast<int>(schedule.size()) < num_simulations) {
        const int rounds = std::max(1, static_cast<int>(num_simulations / (int64_t(phases) * considered)));
        for (int r = 0; r < rounds; ++r) {
            for (int i = 0; i < considered && static_cast<int>(schedule.size()) < num_simulations; ++i) {
                schedule.push_back(visits);
            }
            ++visits;
        }
        considered = std::max(2, considered / 2);
    }
    return schedule;
}

// One node's candidate actions, wherever they are stored.
struct Actions {
    int count;
    const float* prior;    // [count] softmax of the prior logits
    const int32_t* child;  // [count] slot of the child, -1 where unvisited
};

class Tree {
public:
    Tree(int num_roots, int num_simulations, int num_root_actions, int num_inner_actions, int num_considered,
         double discount, double c_visit, double c_scale, double min_q_range, int num_threads)
        : capacity(num_roots),
          S(num_simulations),
          K(num_root_actions),
          M(num_inner_actions),
          discount_(discount),
          c_visit_(c_visit),
          c_scale_(c_scale),
          min_q_range_(min_q_range),
          num_threads_(num_threads),
          schedule_(considered_visits(std::min(num_considered, num_root_actions), num_simulations)),
          raw_value_(size_t(num_roots) * (S + 1)),
          reward_(size_t(num_roots) * (S + 1)),
          return_sum_(size_t(num_roots) * (S + 1)),
          visits_(size_t(num_roots) * (S + 1)),
          parent_slot_(size_t(num_roots) * (S + 1)),
          root_prior_(size_t(num_roots) * K),
          root_score_(size_t(num_roots) * K),
          root_child_(size_t(num_roots) * K),
          inner_prior_(size_t(num_roots) * S * M),
          inner_child_(size_t(num_roots) * S * M),
          q_min_(num_roots),
          q_max_(num_roots),
          depth_sum_(num_roots),
          leaf_slot_(num_roots),
          leaf_action_(num_roots),
          leaf_depth_(num_roots) {}

    const int capacity, S, K, M;
    int B = 0;           // roots of the current batch
    int simulation = 0;  // simulations completed in the current batch

    // Number of bytes held by the storage of the trees.
    size_t memory() const {
        const size_t nodes = size_t(capacity) * (S + 1), root = size_t(capacity) * K, inner = size_t(capacity) * S * M;
        return nodes * (2 * sizeof(float) + sizeof(double) + 2 * sizeof(int32_t)) +
               root * (2 * sizeof(float) + sizeof(int32_t)) + inner * (sizeof(float) + sizeof(int32_t)) +
               size_t(capacity) * (3 * sizeof(double) + 3 * sizeof(int32_t));
    }

    void reset(int num_roots, const float* root_value, const float* logits, const float* gumbel) {
        B = num_roots;
        simulation = 0;
        parallel([=](int b) {
            const size_t node = size_t(b) * (S + 1), edge = size_t(b) * K;
            raw_value_[node] = root_value[b];
            reward_[node] = 0.0f;
            return_sum_[node] = root_value[b];
            visits_[node] = 1;
            parent_slot_[node] = -1;
            q_min_[b] = std::numeric_limits<double>::infinity();
            q_max_[b] = -std::numeric_limits<double>::infinity();
            depth_sum_[b] = 0.0;
            std::fill_n(&root_child_[edge], K, -1);
            softmax(logits + edge, K, &root_prior_[edge]);
            // g + logits, the logits shifted so that their maximum is 0: only differences matter
            const float top = *std::max_element(logits + edge, logits + edge + K);
            for (int a = 0; a < K; ++a) root_score_[edge + a] = gumbel[edge + a] + (logits[edge + a] - top);
        });
    }

    // Walks every root's tree to an edge without a child.
    // parent: flat index slot * B + root into a state pool [(S + 1) * B, ...].
    // action: index among the parent's candidates. edge: row of a flat pool of candidates, the B * K of the roots
    // first, then M for each inner node in the order of the state pool.
    void select(int64_t* parent, int64_t* action, int64_t* edge) {
        parallel([=](int b) {
            const size_t base = size_t(b) * (S + 1);
            int slot = 0, depth = 1;
            int a = select_root(b, schedule_[simulation]);
            int32_t child = root_child_[size_t(b) * K + a];
            while (child >= 0) {
                slot = child;
                ++depth;
                const Actions actions = inner_actions(b, slot);
                a = select_inner(b, actions, raw_value_[base + slot]);
                child = actions.child[a];
            }
            leaf_slot_[b] = slot;
            leaf_action_[b] = a;
            leaf_depth_[b] = depth;
            parent[b] = int64_t(slot) * B + b;
            action[b] = a;
            edge[b] = slot == 0 ? int64_t(b) * K + a
                                : int64_t(B) * K + ((int64_t(slot) - 1) * B + b) * M + a;
        });
    }

    // Adds the selected edges' children and backs their values up. logits == nullptr: equal priors.
    void backup(const float* reward, const float* value, const float* logits) {
        const int slot = simulation + 1;
        parallel([=](int b) {
            const size_t base = size_t(b) * (S + 1);
            const size_t children = (size_t(b) * S + (slot - 1)) * M;
            if (leaf_slot_[b] == 0) {
                root_child_[size_t(b) * K + leaf_action_[b]] = slot;
            } else {
                inner_child_[(size_t(b) * S + (leaf_slot_[b] - 1)) * M + leaf_action_[b]] = slot;
            }
            raw_value_[base + slot] = value[b];
            reward_[base + slot] = reward[b];
            return_sum_[base + slot] = 0.0;
            visits_[base + slot] = 0;
            parent_slot_[base + slot] = leaf_slot_[b];
            std::fill_n(&inner_child_[children], M, -1);
            if (logits != nullptr) {
                softmax(logits + size_t(b) * M, M, &inner_prior_[children]);
            } else {
                std::fill_n(&inner_prior_[children], M, 1.0f / M);
            }
            depth_sum_[b] += leaf_depth_[b];

            double ret = value[b];
            for (int node = slot; node != 0; node = parent_slot_[base + node]) {
                return_sum_[base + node] += ret;
                ++visits_[base + node];
                const double q = q_value(b, node);
                q_min_[b] = std::min(q_min_[b], q);
                q_max_[b] = std::max(q_max_[b], q);
                ret = reward_[base + node] + discount_ * ret;
            }
            return_sum_[base] += ret;
            ++visits_[base];
        });
        ++simulation;
    }

    // Highest g + logits + sigma(q) among the most visited root actions: those left at the end of the halving.
    void best_action(int64_t* out) const {
        for (int b = 0; b < B; ++b) out[b] = select_root(b, most_visits(b, root_actions(b)));
    }

    // softmax(logits + sigma(completed q)), [B, K].
    void policy(float* out) const {
        std::vector<double> score(K);
        for (int b = 0; b < B; ++b) {
            improved_policy(b, root_actions(b), raw_value_[size_t(b) * (S + 1)], score.data());
            for (int a = 0; a < K; ++a) out[size_t(b) * K + a] = static_cast<float>(score[a]);
        }
    }

    void root_value(float* out) const {
        for (int b = 0; b < B; ++b) {
            const size_t root = size_t(b) * (S + 1);
            out[b] = static_cast<float>(return_sum_[root] / visits_[root]);
        }
    }

    void root_visits(int32_t* out) const {
        for (int b = 0; b < B; ++b) {
            for (int a = 0; a < K; ++a) out[size_t(b) * K + a] = child_visits(b, root_child_[size_t(b) * K + a]);
        }
    }

    void q_values(float* out) const {
        for (int b = 0; b < B; ++b) {
            const Actions actions = root_actions(b);
            const double mixed = mixed_value(b, actions, raw_value_[size_t(b) * (S + 1)]);
            for (int a = 0; a < K; ++a) {
                const int32_t child = actions.child[a];
                out[size_t(b) * K + a] = static_cast<float>(child < 0 ? mixed : q_value(b, child));
            }
        }
    }

    void mean_depth(float* out) const {
        for (int b = 0; b < B; ++b) out[b] = static_cast<float>(depth_sum_[b] / std::max(1, simulation));
    }

private:
    double q_value(int b, int32_t slot) const {
        const size_t node = size_t(b) * (S + 1) + slot;
        return reward_[node] + discount_ * (return_sum_[node] / visits_[node]);
    }

    int32_t child_visits(int b, int32_t child) const { return child < 0 ? 0 : visits_[size_t(b) * (S + 1) + child]; }

    Actions root_actions(int b) const { return {K, &root_prior_[size_t(b) * K], &root_child_[size_t(b) * K]}; }

    Actions inner_actions(int b, int slot) const {
        const size_t first = (size_t(b) * S + (slot - 1)) * M;
        return {M, &inner_prior_[first], &inner_child_[first]};
    }

    int32_t most_visits(int b, const Actions& actions) const {
        int32_t most = 0;
        for (int a = 0; a < actions.count; ++a) most = std::max(most, child_visits(b, actions.child[a]));
        return most;
    }

    // v_mix of Gumbel MuZero, appendix D: what an unvisited action is taken to be worth.
    double mixed_value(int b, const Actions& actions, float raw_value) const {
        double prior_sum = 0.0, weighted_q = 0.0;
        int64_t visits = 0;
        for (int a = 0; a < actions.count; ++a) {
            const int32_t child = actions.child[a];
            if (child < 0) continue;
            prior_sum += actions.prior[a];
            weighted_q += actions.prior[a] * q_value(b, child);
            visits += child_visits(b, child);
        }
        if (visits == 0) return raw_value;
        return (raw_value + visits * (weighted_q / prior_sum)) / (1.0 + visits);
    }

    double sigma(int b, double q, int32_t most) const {
        const double range = std::max(q_max_[b] - q_min_[b], min_q_range_);
        return (c_visit_ + most) * c_scale_ * ((q - q_min_[b]) / range);
    }

    // Before the first simulation there is no q to normalise by: every sigma(q) is 0.
    bool has_bounds(int b) const { return q_min_[b] <= q_max_[b]; }

    int select_root(int b, int32_t considered_visit) const {
        const Actions actions = root_actions(b);
        const float* score = &root_score_[size_t(b) * K];
        const bool bounds = has_bounds(b);
        const int32_t most = most_visits(b, actions);
        const double unvisited =
            bounds && considered_visit == 0 ? sigma(b, mixed_value(b, actions, raw_value_[size_t(b) * (S + 1)]), most) : 0.0;
        int best = 0;
        double best_score = -std::numeric_limits<double>::infinity();
        for (int a = 0; a < K; ++a) {
            const int32_t child = actions.child[a];
            if (child_visits(b, child) != considered_visit) continue;
            // no score below the floor: an action that may be visited always beats one that may not
            const double s = std::max(-1e9, score[a] + (child < 0 ? unvisited : sigma(b, q_value(b, child), most)));
            if (s > best_score) {
                best_score = s;
                best = a;
            }
        }
        return best;
    }

    // softmax(logits + sigma(completed q)) = prior * exp(sigma) / sum, into out [count].
    void improved_policy(int b, const Actions& actions, float raw_value, double* out) const {
        const bool bounds = has_bounds(b);
        const int32_t most = most_visits(b, actions);
        const double unvisited = bounds ? sigma(b, mixed_value(b, actions, raw_value), most) : 0.0;
        double top = -std::numeric_limits<double>::infinity();
        for (int a = 0; a < actions.count; ++a) {
            const int32_t child = actions.child[a];
            out[a] = child < 0 ? unvisited : sigma(b, q_value(b, child), most);
            top = std::max(top, out[a]);
        }
        double sum = 0.0;
        for (int a = 0; a < actions.count; ++a) {
            out[a] = actions.prior[a] * std::exp(out[a] - top);
            sum += out[a];
        }
        for (int a = 0; a < actions.count; ++a) out[a] /= sum;
    }

    // argmax of pi'(a) - N(a) / (1 + sum N): the visits follow the improved policy.
    int select_inner(int b, const Actions& actions, float raw_value) const {
        static thread_local std::vector<double> policy;
        policy.resize(actions.count);
        improved_policy(b, actions, raw_value, policy.data());
        int64_t visits = 0;
        for (int a = 0; a < actions.count; ++a) visits += child_visits(b, actions.child[a]);
        int best = 0;
        double best_score = -std::numeric_limits<double>::infinity();
        for (int a = 0; a < actions.count; ++a) {
            const double s = policy[a] - child_visits(b, actions.child[a]) / (1.0 + visits);
            if (s > best_score) {
                best_score = s;
                best = a;
            }
        }
        return best;
    }

    // No prior is exactly 0, so that the weights of v_mix always have a sum.
    static void softmax(const float* logits, int count, float* out) {
        const float top = *std::max_element(logits, logits + count);
        double sum = 0.0;
        for (int a = 0; a < count; ++a) sum += std::exp(double(logits[a]) - top);
        for (int a = 0; a < count; ++a) {
            const double p = std::exp(double(logits[a]) - top) / sum;
            out[a] = std::max(static_cast<float>(p), std::numeric_limits<float>::min());
        }
    }

    template <typename Function>
    void parallel(Function function) const {
        const int threads = std::max(1, std::min(num_threads_, B / kMinRootsPerThread));
        auto run = [&](int part) {
            const int begin = int(int64_t(B) * part / threads), end = int(int64_t(B) * (part + 1) / threads);
            for (int b = begin; b < end; ++b) function(b);
        };
        // Threads are started per call: no pool that a fork would leave without its threads, and no second OpenMP
        // runtime beside the one of torch.
        std::vector<std::thread> others;
        for (int part = 1; part < threads; ++part) others.emplace_back(run, part);
        run(0);
        for (auto& thread : others) thread.join();
    }

    const double discount_, c_visit_, c_scale_, min_q_range_;
    const int num_threads_;
    const std::vector<int32_t> schedule_;
    std::vector<float> raw_value_, reward_;     // [capacity, S + 1]
    std::vector<double> return_sum_;            // [capacity, S + 1] network value and returns backed up
    std::vector<int32_t> visits_, parent_slot_;  // [capacity, S + 1]
    std::vector<float> root_prior_, root_score_;  // [capacity, K] softmax of the logits; g + logits
    std::vector<int32_t> root_child_;             // [capacity, K]
    std::vector<float> inner_prior_;              // [capacity, S, M]
    std::vector<int32_t> inner_child_;            // [capacity, S, M]
    std::vector<double> q_min_, q_max_, depth_sum_;              // [capacity]
    std::vector<int32_t> leaf_slot_, leaf_action_, leaf_depth_;  // [capacity] the edge selected last
};

}  // namespace ezv2
