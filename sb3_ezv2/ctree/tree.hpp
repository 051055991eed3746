// Batched Gumbel search trees in flat arrays.
//
// A node slot is (root, simulation): slot 0 is the root, simulation s creates slot s + 1. Storage is root-major, so
// that one search touches one contiguous piece of every array. Roots are independent of each other: they can be
// split over threads in any way without changing a result.
//
// What an inner selection reads of a node is one cache line, and it reads the visited children only: the unvisited ones
// all have the same completed q, so that the next of them to be visited is the one with the highest prior, whatever
// the q's are. It is looked up once, when the one before it was expanded.
//
// Sources: Danihelka et al. 2022 (Gumbel MuZero: root selection, completed Q, inner selection), EfficientZero
// Eq. 10 (soft min-max bounds), EfficientZero V2 Eq. 18-19 (policy target), Eq. 10-11 (search-based value).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "simd.hpp"

namespace ezv2 {

// Below this many roots per thread, starting a thread costs more than it saves.
constexpr int kMinRootsPerThread = 512;

// Roots that are walked together: what they need fits into the nearest cache.
constexpr int kBlock = 16;

// e^x for x <= 0, to 1e-11 and without a call: x = n ln 2 + r with |r| <= ln(2) / 2, a polynomial in r, and n added to the
// exponent. The same on every platform, which the library's exp is not.
inline double exp_negative(double x) {
    x = std::max(x, -700.0);
    const double shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52: rounds, n in the lowest bits
    const double n = shifted - 6755399441055744.0;
    const double r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    double p = 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits, exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    std::memcpy(&bits, &p, sizeof bits);
    bits += exponent << 52;
    std::memcpy(&p, &bits, sizeof bits);
    return p;
}

inline bool all_finite(const float* x, size_t count) {
    uint32_t bad = 0;
    for (size_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bad |= uint32_t((bits & 0x7f800000u) == 0x7f800000u);
    }
    return bad == 0;
}

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

// One state. Of the root, the fields that belong to the edge above it are not used.
struct Node {
    double return_sum;   // network value and the returns backed up through this node
    double q;            // reward + discount * mean return, of the edge above
    double open_prior;   // sum of the priors of the unvisited actions
    float raw_value;     // the network's value
    float reward;        // of the edge above
    float prior;         // of the edge above
    float next_prior;    // of next_action
    int32_t visits;      // returns in return_sum
    int32_t parent;      // slot
    int32_t action;      // of the parent
    int32_t child;       // slot of the newest child, -1 if there is none
    int32_t sibling;     // slot of the parent's next older child, -1 if there is none
    int32_t next_action; // the unvisited action with the highest prior, -1 if there is none
};
static_assert(sizeof(Node) == 64, "a node fills a cache line");

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
          nodes_(size_t(num_roots) * (S + 1)),
          root_prior_(size_t(num_roots) * K),
          root_score_(size_t(num_roots) * K),
          root_q_(size_t(num_roots) * K),
          root_visits_(size_t(num_roots) * K),
          root_child_(size_t(num_roots) * K),
          open_(size_t(num_roots) * S * M),
          roots_(num_roots) {}

    const int capacity, S, K, M;
    int B = 0;           // roots of the current batch
    int simulation = 0;  // simulations completed in the current batch

    // Number of bytes held by the storage of the trees.
    size_t memory() const {
        const size_t edges = size_t(capacity) * K;
        return nodes_.size() * sizeof(Node) + edges * (2 * sizeof(float) + sizeof(double) + 2 * sizeof(int32_t)) +
               open_.size() * sizeof(float) + roots_.size() * sizeof(Root);
    }

    void reset(int num_roots, const float* root_value, const float* logits, const float* gumbel) {
        B = num_roots;
        simulation = 0;
        over_roots([=](int begin, int end, int, double*) {
            for (int b = begin; b < end; ++b) reset_one(b, root_value, logits, gumbel);
        });
    }

    // Walks every root's tree to an edge without a child.
    // parent: flat index slot * B + root into a state pool [(S + 1) * B, ...].
    // action: index among the parent's candidates. edge: row of a flat pool of candidates, the B * K of the roots
    // first, then M for each inner node in the order of the state pool.
    void select(int64_t* parent, int64_t* action, int64_t* edge) {
        over_roots([=](int begin, int end, int, double* scratch) {
            for (int first = begin; first < end; first += kBlock) {
                select(first, std::min(first + kBlock, end), simulation, scratch, parent, action, edge);
            }
        });
    }

    // Adds the selected edges' children and backs their values up. logits == nullptr: equal priors.
    void backup(const float* reward, const float* value, const float* logits) {
        over_roots([=](int begin, int end, int, double*) { backup(begin, end, end, reward, value, logits); });
        ++simulation;
    }

    // backup() and the select() of the next simulation, in one walk over the roots.
    void step(const float* reward, const float* value, const float* logits, int64_t* parent, int64_t* action, int64_t* edge) {
        over_roots([=](int begin, int end, int, double* scratch) {
            for (int first = begin; first < end; first += kBlock) {
                const int next = std::min(first + kBlock, end);
                backup(first, next, end, reward, value, logits);
                select(first, next, simulation + 1, scratch, parent, action, edge);
            }
        });
        ++simulation;
    }

    // Highest g + logits + sigma(q) among the most visited root actions: those left at the end of the halving.
    void best_action(int64_t* out) const {
        for (int b = 0; b < B; ++b) out[b] = select_root(b, roots_[b].most_visits);
    }

    // softmax(logits + sigma(completed q)) = prior * exp(sigma) / sum, [B, K].
    void policy(float* out) const {
        std::vector<double> q(K);
        for (int b = 0; b < B; ++b) {
            completed_root_q(b, q.data());
            const double scale = simulation > 0 ? sigma_scale(b, roots_[b].most_visits) : 0.0;
            const double top = *std::max_element(q.begin(), q.end());
            double sum = 0.0;
            for (int a = 0; a < K; ++a) {
                q[a] = root_prior_[size_t(b) * K + a] * exp_negative(scale * (q[a] - top));
                sum += q[a];
            }
            for (int a = 0; a < K; ++a) out[size_t(b) * K + a] = static_cast<float>(q[a] / sum);
        }
    }

    void root_value(float* out) const {
        for (int b = 0; b < B; ++b) {
            const Node& root = nodes_[size_t(b) * (S + 1)];
            out[b] = static_cast<float>(root.return_sum / root.visits);
        }
    }

    void root_visits(int32_t* out) const { std::copy_n(root_visits_.begin(), size_t(B) * K, out); }

    void q_values(float* out) const {
        std::vector<double> q(K);
        for (int b = 0; b < B; ++b) {
            completed_root_q(b, q.data());
            for (int a = 0; a < K; ++a) out[size_t(b) * K + a] = static_cast<float>(q[a]);
        }
    }

    // All nodes made so far, [B, simulation + 1]: integers [.., 3] (parent's slot, action, visits), which of a root are -1, -1 and
    // the simulations; numbers [.., 5] (prior, reward and q of the edge above, the network's value, mean return).
    void nodes(int32_t* integers, float* numbers) const {
        for (int b = 0; b < B; ++b) {
            for (int slot = 0; slot <= simulation; ++slot, integers += 3, numbers += 5) {
                const Node& x = nodes_[size_t(b) * (S + 1) + slot];
                const bool root = slot == 0;
                integers[0] = root ? -1 : x.parent;
                integers[1] = root ? -1 : x.action;
                integers[2] = root ? simulation : x.visits;
                numbers[0] = root ? 1.0f : x.prior;
                numbers[1] = root ? 0.0f : x.reward;
                numbers[3] = x.raw_value;
                numbers[4] = static_cast<float>(x.return_sum / x.visits);
                numbers[2] = root ? numbers[4] : static_cast<float>(x.q);
            }
        }
    }

    void mean_depth(float* out) const {
        for (int b = 0; b < B; ++b) out[b] = static_cast<float>(roots_[b].depth_sum / double(std::max(1, simulation)));
    }

    // What follows serves callers that do more in the same walk over the roots; they count `simulation` up afterwards.

    int threads() const { return std::max(1, std::min(num_threads_, B / kMinRootsPerThread)); }

    // Calls function(begin, end, part, scratch) for the roots begin to end of each of threads() threads.
    template <typename Function>
    void over_roots(Function function) {
        const int threads = this->threads();
        const size_t width = std::min(S, M) + 1;
        if (scratch_.size() < threads * width) scratch_.resize(threads * width);
        auto run = [&](int part) {
            const int begin = int(int64_t(B) * part / threads), end = int(int64_t(B) * (part + 1) / threads);
            function(begin, end, part, &scratch_[part * width]);
        };
        // Threads are started per call: no pool that a fork would leave without its threads, and no second OpenMP
        // runtime beside the one of torch.
        std::vector<std::thread> others;
        int part = 1;
        try {
            for (; part < threads; ++part) others.emplace_back(run, part);
        } catch (const std::system_error&) {  // no more threads to be had: the rest is done here
        }
        run(0);
        for (; part < threads; ++part) run(part);
        for (auto& thread : others) thread.join();
    }

    // Walks the trees of the roots first to next, at most kBlock of them, to edges without a child; s: the simulation. All
    // take a step before any takes the next one, so that the records they need come from memory at the same time.
    // scratch: of the thread, see over_roots.
    void select(int first, int next, int s, double* scratch, int64_t* parent, int64_t* action, int64_t* edge) {
        int32_t slot[kBlock], chosen[kBlock], child[kBlock], active[kBlock];
        int walking = 0;
        for (int b = first; b < next; ++b) {
            const int i = b - first;
            slot[i] = 0;
            chosen[i] = select_root(b, schedule_[s]);
            child[i] = root_child_[size_t(b) * K + chosen[i]];
            ++roots_[b].depth_sum;
            if (child[i] < 0) continue;
            fetch(&nodes_[size_t(b) * (S + 1) + child[i]]);
            active[walking++] = i;
        }
        while (walking > 0) {
            for (int j = 0; j < walking; ++j) {
                const Node* nodes = &nodes_[size_t(first + active[j]) * (S + 1)];
                const int32_t newest = nodes[child[active[j]]].child;
                if (newest >= 0) fetch(&nodes[newest]);
            }
            int still = 0;
            for (int j = 0; j < walking; ++j) {
                const int i = active[j], b = first + i;
                slot[i] = child[i];
                ++roots_[b].depth_sum;
                chosen[i] = select_inner(b, nodes_[size_t(b) * (S + 1) + slot[i]], scratch, &child[i]);
                if (child[i] < 0) continue;
                fetch(&nodes_[size_t(b) * (S + 1) + child[i]]);
                active[still++] = i;
            }
            walking = still;
        }
        for (int b = first; b < next; ++b) {
            const int32_t at = slot[b - first], a = chosen[b - first];
            roots_[b].leaf_slot = at;
            roots_[b].leaf_action = a;
            parent[b] = int64_t(at) * B + b;
            action[b] = a;
            edge[b] = at == 0 ? int64_t(b) * K + a : int64_t(B) * K + ((int64_t(at) - 1) * B + b) * M + a;
        }
    }

    // Adds the children of the selected edges of the roots first to next and backs their values up. end: of the thread's roots.
    void backup(int first, int next, int end, const float* reward, const float* value, const float* logits) {
        for (int b = first; b < next; ++b) {
            prefetch(b, end);
            backup_one(b, reward, value, logits);
        }
    }

private:
    // What a search keeps besides its nodes: the bounds of all q's that have appeared in it.
    struct Root {
        double q_min = std::numeric_limits<double>::infinity();
        double q_max = -std::numeric_limits<double>::infinity();
        int64_t depth_sum = 0;
        int32_t leaf_slot = 0, leaf_action = 0;  // the edge selected last
        int32_t most_visits = 0;                 // of the root's actions
    };

    // Between two calls the model has used the caches for itself: what the roots ahead will need is asked for in time.
    void prefetch(int b, int end) const {
        if (b + 1 < end) {  // further up the path that its backup will take
            const Node* nodes = &nodes_[size_t(b + 1) * (S + 1)];
            fetch(&nodes[nodes[roots_[b + 1].leaf_slot].parent]);
        }
        if (const int next = b + 3; next < end) {  // its record was asked for at b - 3
            fetch(&nodes_[size_t(next) * (S + 1) + roots_[next].leaf_slot]);
        }
        if (const int ahead = b + 6; ahead < end) {
            const size_t node = size_t(ahead) * (S + 1), edge = size_t(ahead) * K;
            fetch(&roots_[ahead]);
            fetch(&nodes_[node]);
            fetch(&nodes_[node + simulation + 1]);
            fetch(&open_[(size_t(ahead) * S + simulation) * M]);
            for (int a = 0; a < K; a += 16) {
                fetch(&root_visits_[edge + a]);
                fetch(&root_child_[edge + a]);
                fetch(&root_score_[edge + a]);
                fetch(&root_q_[edge + a]);
                fetch(&root_q_[edge + std::min(a + 8, K - 1)]);
            }
        }
    }

    // Adds the child of root b's selected edge and backs its value up.
    void backup_one(int b, const float* reward, const float* value, const float* logits) {
        const int32_t slot = simulation + 1;
        Node* nodes = &nodes_[size_t(b) * (S + 1)];
        Root& root = roots_[b];
        Node& parent = nodes[root.leaf_slot];
        Node& leaf = nodes[slot];
        leaf.return_sum = 0.0;
        leaf.visits = 0;
        leaf.raw_value = value[b];
        leaf.reward = reward[b];
        leaf.parent = root.leaf_slot;
        leaf.action = root.leaf_action;
        leaf.child = -1;
        float* open = &open_[(size_t(b) * S + (slot - 1)) * M];
        if (logits != nullptr) {
            softmax(logits + size_t(b) * M, M, open);
        } else {
            std::fill_n(open, M, 1.0f / M);
        }
        find_next(leaf, open);
        if (root.leaf_slot == 0) {
            leaf.prior = root_prior_[size_t(b) * K + leaf.action];
            leaf.sibling = -1;  // the root has its children in root_child_
            root_child_[size_t(b) * K + leaf.action] = slot;
        } else {
            leaf.prior = parent.next_prior;
            leaf.sibling = parent.child;
            parent.child = slot;
            float* parents_open = &open_[(size_t(b) * S + (root.leaf_slot - 1)) * M];
            parents_open[leaf.action] = 0.0f;
            find_next(parent, parents_open);
        }

        double ret = value[b];
        int32_t node = slot;
        while (true) {
            Node& x = nodes[node];
            x.return_sum += ret;
            ++x.visits;
            x.q = x.reward + discount_ * (x.return_sum / x.visits);
            root.q_min = std::min(root.q_min, x.q);
            root.q_max = std::max(root.q_max, x.q);
            ret = x.reward + discount_ * ret;
            if (x.parent == 0) break;
            node = x.parent;
        }
        root_q_[size_t(b) * K + nodes[node].action] = nodes[node].q;
        root_visits_[size_t(b) * K + nodes[node].action] = nodes[node].visits;
        root.most_visits = std::max(root.most_visits, nodes[node].visits);
        nodes[0].return_sum += ret;
        ++nodes[0].visits;
    }

    void reset_one(int b, const float* root_value, const float* logits, const float* gumbel) {
        const size_t edge = size_t(b) * K;
        Node& root = nodes_[size_t(b) * (S + 1)];
        root = Node{};
        root.raw_value = root_value[b];
        root.return_sum = root_value[b];
        root.visits = 1;
        roots_[b] = Root{};
        std::fill_n(&root_q_[edge], K, 0.0);
        std::fill_n(&root_visits_[edge], K, 0);
        std::fill_n(&root_child_[edge], K, -1);
        softmax(logits + edge, K, &root_prior_[edge]);
        // g + logits, the logits shifted so that their maximum is 0: only differences matter
        const float top = *std::max_element(logits + edge, logits + edge + K);
        for (int a = 0; a < K; ++a) root_score_[edge + a] = gumbel[edge + a] + (logits[edge + a] - top);
    }

    // sigma(q) = scale * (q - q_min). Only differences of sigmas count, in every softmax and every argmax.
    double sigma_scale(int b, int32_t most_visits) const {
        const Root& root = roots_[b];
        return (c_visit_ + most_visits) * c_scale_ / std::max(root.q_max - root.q_min, min_q_range_);
    }

    // The unvisited actions take v_mix of Gumbel MuZero, appendix D.
    void completed_root_q(int b, double* out) const {
        const size_t edge = size_t(b) * K;
        double prior_sum = 0.0, weighted_q = 0.0;
        int64_t visits = 0;
        for (int a = 0; a < K; ++a) {
            if (root_visits_[edge + a] == 0) continue;
            prior_sum += root_prior_[edge + a];
            weighted_q += root_prior_[edge + a] * root_q_[edge + a];
            visits += root_visits_[edge + a];
        }
        const double raw = nodes_[size_t(b) * (S + 1)].raw_value;
        const double mixed = visits == 0 ? raw : (raw + visits * (weighted_q / prior_sum)) / (1.0 + visits);
        for (int a = 0; a < K; ++a) out[a] = root_visits_[edge + a] == 0 ? mixed : root_q_[edge + a];
    }

    // Highest g + logits + sigma(q) among the actions with so many visits, ties to the lowest index. If these are unvisited,
    // they have the same completed q, and sigma is left out.
    int select_root(int b, int32_t considered_visit) const {
        const size_t edge = size_t(b) * K;
        const double scale = considered_visit == 0 ? 0.0 : sigma_scale(b, roots_[b].most_visits);
        const double q_min = considered_visit == 0 ? 0.0 : roots_[b].q_min;
        const float* score = &root_score_[edge];
        const double* q = &root_q_[edge];
        const int32_t* visits = &root_visits_[edge];
        int best = 0;
        double best_score = -std::numeric_limits<double>::infinity();
        // Without branches, which would be mispredicted
        for (int a = 0; a < K; ++a) {
            // no score below the floor: an action that may be visited always beats one that may not
            const double floored = std::max(-1e9, score[a] + scale * (q[a] - q_min));
            const double s = visits[a] == considered_visit ? floored : -1e10;
            best = s > best_score ? a : best;
            best_score = std::max(s, best_score);
        }
        return best;
    }

    // argmax of pi'(a) - N(a) / (1 + sum N), ties to the lowest index: the visits follow the improved policy.
    // Gives the action, and the slot of its child or -1.
    int select_inner(int b, const Node& node, double* weights, int32_t* slot) const {
        *slot = -1;
        if (node.child < 0) return node.next_action;
        const Node* nodes = &nodes_[size_t(b) * (S + 1)];
        double prior_sum = 0.0, weighted_q = 0.0, top = -std::numeric_limits<double>::infinity();
        int32_t visits = 0, most = 0;
        for (int32_t child = node.child; child >= 0; child = nodes[child].sibling) {
            const Node& x = nodes[child];
            prior_sum += x.prior;
            weighted_q += x.prior * x.q;
            visits += x.visits;
            most = std::max(most, x.visits);
            top = std::max(top, x.q);
        }
        const double scale = sigma_scale(b, most);
        double sum = 0.0, best_score = -std::numeric_limits<double>::infinity();
        int best = node.next_action;
        if (best >= 0) {
            const double mixed = (node.raw_value + visits * (weighted_q / prior_sum)) / (1.0 + visits);
            top = std::max(top, mixed);
            const double weight = exp_negative(scale * (mixed - top));
            sum = node.open_prior * weight;
            best_score = node.next_prior * weight;
        }
        int i = 0;
        for (int32_t child = node.child; child >= 0; child = nodes[child].sibling) {
            const Node& x = nodes[child];
            weights[i] = x.prior * exp_negative(scale * (x.q - top));
            sum += weights[i++];
        }
        // times the sum of the weights: pi' itself is not needed
        const double per_visit = sum / (1.0 + visits);
        i = 0;
        for (int32_t child = node.child; child >= 0; child = nodes[child].sibling) {
            const Node& x = nodes[child];
            const double score = weights[i++] - x.visits * per_visit;
            if (score > best_score || (score == best_score && x.action < best)) {
                best_score = score;
                best = x.action;
                *slot = child;
            }
        }
        return best;
    }

    // open: [M] the priors of the unvisited actions, 0 where visited. No prior is 0.
    void find_next(Node& node, const float* open) const {
        float highest = 0.0f;
        int next = -1;
        double sum = 0.0;
        for (int a = 0; a < M; ++a) {
            sum += open[a];
            next = open[a] > highest ? a : next;
            highest = std::max(open[a], highest);
        }
        node.open_prior = sum;
        node.next_prior = highest;
        node.next_action = next;
    }

    // No prior is exactly 0, so that the weights of v_mix always have a sum. Two simple loops, which compilers vectorise.
    static void softmax(const float* logits, int count, float* out) {
        const float top = *std::max_element(logits, logits + count);
        for (int a = 0; a < count; ++a) out[a] = std::max(logits[a] - top, -87.0f);
        for (int a = 0; a < count; ++a) out[a] = exp_float(out[a]);
        double sum = 0.0;
        for (int a = 0; a < count; ++a) sum += out[a];
        const double factor = 1.0 / sum;
        for (int a = 0; a < count; ++a) out[a] = std::max(float(out[a] * factor), std::numeric_limits<float>::min());
    }

    const double discount_, c_visit_, c_scale_, min_q_range_;
    const int num_threads_;
    const std::vector<int32_t> schedule_;
    std::vector<Node> nodes_;                             // [capacity, S + 1]
    std::vector<float> root_prior_, root_score_;          // [capacity, K] softmax of the logits; g + logits
    std::vector<double> root_q_;                          // [capacity, K]
    std::vector<int32_t> root_visits_, root_child_;       // [capacity, K]
    std::vector<float> open_;                             // [capacity, S, M] priors of the unvisited actions, else 0
    std::vector<Root> roots_;                             // [capacity]
    std::vector<double> scratch_;                         // one piece for each thread
};

}  // namespace ezv2
