// Attention of few queries to a long text: whole, or to the blocks that each group of heads chooses.
//
//   score    q . mean / sqrt(head_dim)   for the means of windows of keys, and how much the group gives each
//   choose   blocks: those that every query gets, and of the others those whose best window gets most
//   attend   softmax over the tokens of the chosen blocks, block after block
//
// What is computed stands in inference/sparse_attention.py, which this is held equal to; here is how.
//
// - All heads of a group read the same keys. So a vector holds one number of each head, and a key that is read
//   from memory meets all heads at once: a product is  vector += number of the key * vector of the queries,
//   without a sum across lanes at the end.
// - Nothing is copied together. Blocks are read where they lie, once, and a softmax that goes on from block to
//   block (it keeps the largest score and the sum so far, and corrects both when a larger score comes) needs no
//   second reading.
// - One thread takes a query of a group from scores to result. Where there are fewer of these than threads, as
//   for one token, each step is shared out, and the parts of the softmax are put together at the end.
//
// - A step for a key or a value takes less time than its memory does, if that is asked early enough. While the
//   keys of some tokens are multiplied their values are fetched, and meanwhile of the values the next keys, which
//   the processor cannot guess: they stand in another block. (That alone is worth a factor of two.)
//
// Vectors are GCC's and Clang's own, which become what the processor has.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace {

using torch::stable::Tensor;

#if defined(__AVX512F__)
constexpr size_t REGISTER = 64;  // bytes
#elif defined(__AVX__)
constexpr size_t REGISTER = 32;
#else
constexpr size_t REGISTER = 16;
#endif

constexpr int64_t LINE = 16;  // numbers that memory gives at once
constexpr int64_t AHEAD = 24;  // vectors, of means that are read one after the other

// ---------------------------------------------------------------------------------------------- lanes
//
// One number of each head of a group; lanes without a head hold what no one reads.

template <int COUNT>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * COUNT)));
  typedef int32_t Ints __attribute__((vector_size(4 * COUNT)));
  static constexpr int count = COUNT;
  static constexpr int keys = sizeof(Floats) > REGISTER ? 4 : 8;  // at once: as many sums as registers hold
};

// e^x, off by 2e-7 of itself at most: 2^n times e^r with r below half of ln 2. Below -87 as at -87, almost 0.
template <class L>
inline typename L::Floats exp_of(typename L::Floats x) {
  using Floats = typename L::Floats;
  x = x < -87.0f ? Floats{} - 87.0f : x;
  Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // the nearest whole number
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Floats)((__builtin_convertvector(n, typename L::Ints) + 127) << 23);
}

// By halves, which compilers make vectors of.
template <int COUNT>
inline float sum_of(const float* x) {
  if constexpr (COUNT == 1) {
    return x[0];
  } else {
    float halves[COUNT / 2];
    for (int i = 0; i < COUNT / 2; i++) halves[i] = x[i] + x[i + COUNT / 2];
    return sum_of<COUNT / 2>(halves);
  }
}

// Products of the queries with some vectors, each so many numbers `apart` from the one before, while as many at
// `next` are fetched.
template <class L, int KEYS>
inline void multiply(const typename L::Floats* q, const float* keys, int64_t apart, int64_t head_dim,
                     typename L::Floats* scores, const float* next) {
  typename L::Floats sums[KEYS] = {};
  for (int64_t d = 0; d < head_dim; d++) {
    if (d % LINE == 0)
      for (int i = 0; i < KEYS; i++) __builtin_prefetch(next + i * apart + d);
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; i++) sums[i] += keys[i * apart + d] * q[d];
  }
  for (int i = 0; i < KEYS; i++) scores[i] = sums[i];
}

template <class L>
void multiply_all(const typename L::Floats* q, const float* keys, int64_t count, int64_t apart, int64_t head_dim,
                  typename L::Floats* scores, const float* next) {
  int64_t i = 0;
  for (; i + L::keys <= count; i += L::keys)
    multiply<L, L::keys>(q, keys + i * apart, apart, head_dim, scores + i, next + i * apart);
  for (; i < count; i++) multiply<L, 1>(q, keys + i * apart, apart, head_dim, scores + i, next + i * apart);
}

// What some weighted values add to the result; the same of `apart` and `next`.
template <class L, int KEYS>
inline void add(const typename L::Floats* weights, const float* values, int64_t apart, int64_t head_dim,
                typename L::Floats* out, const float* next) {
  typename L::Floats w[KEYS];
  for (int i = 0; i < KEYS; i++) w[i] = weights[i];
  for (int64_t d = 0; d < head_dim; d++) {
    if (d % LINE == 0)
      for (int i = 0; i < KEYS; i++) __builtin_prefetch(next + i * apart + d);
    typename L::Floats sum = out[d];
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; i++) sum += values[i * apart + d] * w[i];
    out[d] = sum;
  }
}

template <class L>
void add_all(const typename L::Floats* weights, const float* values, int64_t count, int64_t apart, int64_t head_dim,
             typename L::Floats* out, const float* next) {
  int64_t i = 0;
  for (; i + L::keys <= count; i += L::keys)
    add<L, L::keys>(weights + i, values + i * apart, apart, head_dim, out, next + i * apart);
  for (; i < count; i++) add<L, 1>(weights + i, values + i * apart, apart, head_dim, out, next + i * apart);
}

// ---------------------------------------------------------------------------------------------- softmax

// A part of a softmax: the largest score, the sum of all weights, and that of weighted values. A lane that has met
// nothing yet is below all scores, and finite, so that no difference of two such is no number.
template <class L>
struct Part {
  using Floats = typename L::Floats;
  static constexpr float nothing = -1e30f;
  Floats largest, sum;
  std::vector<Floats> out;

  void begin(int64_t head_dim) {
    largest = Floats{} + nothing, sum = Floats{};
    out.assign(head_dim, Floats{});
  }

  // The largest score may have become larger; what is there is corrected for it.
  void rise(const Floats* scores, int64_t count) {
    Floats most = largest;
    for (int64_t i = 0; i < count; i++) most = scores[i] > most ? scores[i] : most;
    if (std::memcmp(&most, &largest, sizeof most)) {
      Floats less = exp_of<L>(largest - most);
      sum *= less;
      for (Floats& each : out) each *= less;
      largest = most;
    }
  }

  // Scores become weights.
  void weigh(Floats* scores, int64_t count) {
    for (int64_t i = 0; i < count; i++) scores[i] = exp_of<L>(scores[i] - largest), sum += scores[i];
  }
};

// The result of all parts, for lanes from `first` on, as many as there are heads.
template <class L>
void put_together(std::vector<Part<L>>& parts, float* out, int64_t first, int64_t heads, int64_t apart) {
  using Floats = typename L::Floats;
  Floats largest = parts[0].largest, sum = {};
  for (const Part<L>& part : parts) largest = part.largest > largest ? part.largest : largest;
  std::vector<Floats> scale;
  for (const Part<L>& part : parts) {
    scale.push_back(exp_of<L>(part.largest - largest));
    sum += part.sum * scale.back();
  }
  for (size_t d = 0; d < parts[0].out.size(); d++) {
    Floats result = {};
    for (size_t i = 0; i < parts.size(); i++) result += parts[i].out[d] * scale[i];
    result /= sum;
    for (int64_t head = 0; head < heads; head++) out[head * apart + d] = result[first + head];
  }
}

// ---------------------------------------------------------------------------------------------- one query

struct Sizes {
  int64_t kernel_size, kernel_stride, block_size, init_blocks, local_blocks, num_blocks, all_visible, coarse_topk;
  bool approximate;  // sums of the softmax over windows from coarse means
  int64_t head_dim;

  static constexpr int64_t coarse = 4;  // times as long and as far apart are coarse windows
  int64_t windows(int64_t tokens, int64_t times) const {
    int64_t size = times * kernel_size;
    return tokens < size ? 0 : (tokens - size) / (times * kernel_stride) + 1;
  }
};

struct Run {
  int64_t begin, end;
};

// Vectors by their place in a text: behind each other, or in pages that lie anywhere; and then some that lie
// elsewhere, as guesses do.
struct Rows {
  const float* data;
  int64_t apart;  // numbers from one to the next
  const int64_t* pages = nullptr;
  int64_t per_page = 0, skip = 0;  // the first one has so many places before it
  int64_t count = std::numeric_limits<int64_t>::max();
  const std::vector<const float*>* others = nullptr;  // from `count` on

  const float* at(int64_t row) const {
    if (row >= count) return (*others)[row - count];
    if (!pages) return data + row * apart;
    row += skip;
    return data + (pages[row / per_page] * per_page + row % per_page) * apart;
  }

  // How many there are from one on, up to an end, that are `apart`.
  int64_t run(int64_t row, int64_t end) const {
    if (row >= count) return 1;
    end = std::min(end, count);
    return (pages ? std::min(end, row + per_page - (row + skip) % per_page) : end) - row;
  }
};

template <class L>
void multiply_rows(const typename L::Floats* q, const Rows& rows, Run run, int64_t head_dim,
                   typename L::Floats* scores) {
  for (int64_t i = run.begin, count; i < run.end; i += count) {
    count = rows.run(i, run.end);
    const float *here = rows.at(i), *next = rows.pages ? here : here + AHEAD * rows.apart;
    multiply_all<L>(q, here, count, rows.apart, head_dim, scores + i - run.begin, next);
  }
}

// The part-th of so many parts of a range.
inline Run part_of(Run whole, int64_t part, int64_t parts) {
  int64_t size = whole.end - whole.begin;
  return {whole.begin + size * part / parts, whole.begin + size * (part + 1) / parts};
}

template <class L>
class Query {
  using Floats = typename L::Floats;
  static constexpr int64_t tile = 64;  // tokens whose scores are at hand together

  const Sizes& sizes;
  int64_t heads = 0, at = 0;  // at: its place in the text; negative for one that is no text
  Rows key, value, fine, coarse;
  std::vector<Floats> q, fine_scores, coarse_scores;
  Floats total = {};  // by which shares are measured: log of the sum of e^score over windows
  std::vector<float> shares, best;  // of windows; of blocks
  std::vector<Run> runs;  // of fine windows that are read
  std::vector<int64_t> blocks, order;  // chosen; for choosing
  std::vector<Part<L>> parts;

  int64_t seen(int64_t times) const { return sizes.windows(at + 1, times); }
  bool chooses() const { return at >= sizes.all_visible; }
  bool use_coarse() const { return sizes.approximate && seen(Sizes::coarse) > 0; }

 public:
  explicit Query(const Sizes& sizes) : sizes(sizes) {}

  // `from`: the first head's query; heads lie `apart` numbers from each other.
  void begin(const float* from, int64_t apart, int64_t heads, int64_t at, Rows key, Rows value, Rows fine, Rows coarse,
             int64_t split) {
    this->heads = heads, this->at = at;
    this->key = key, this->value = value, this->fine = fine, this->coarse = coarse;
    q.assign(sizes.head_dim, Floats{});
    float scale = 1 / std::sqrt((float)sizes.head_dim);
    for (int64_t head = 0; head < heads; head++)
      for (int64_t d = 0; d < sizes.head_dim; d++) q[d][head] = from[head * apart + d] * scale;
    parts.resize(split);
    if (!chooses()) return;
    fine_scores.resize(seen(1)), coarse_scores.resize(seen(Sizes::coarse));
    runs.assign(1, {0, seen(1)});
  }

  void score_coarse(int64_t part, int64_t of) {
    if (!chooses() || !use_coarse()) return;
    Run mine = part_of({0, seen(Sizes::coarse)}, part, of);
    multiply_rows<L>(q.data(), coarse, mine, sizes.head_dim, coarse_scores.data() + mine.begin);
  }

  // Of two levels: fine windows are read inside the coarse ones that get most, and behind all of them.
  void look_closer() {
    if (!chooses() || !use_coarse()) return;
    int64_t count = seen(Sizes::coarse), reach = 3 * sizes.kernel_size / sizes.kernel_stride;
    Floats largest = coarse_scores[0], sum = {};
    for (const Floats& score : coarse_scores) largest = score > largest ? score : largest;
    for (Floats& score : coarse_scores) score = exp_of<L>(score - largest), sum += score;
    for (int lane = 0; lane < L::count; lane++) total[lane] = largest[lane] + std::log(sum[lane]);
    if (!sizes.coarse_topk) return;
    share(coarse_scores, {0, count}, 1 / sum);
    largest_of(shares, {0, count}, sizes.coarse_topk);
    runs.clear();
    for (int64_t c : order) add_run({Sizes::coarse * c, std::min(seen(1), Sizes::coarse * c + reach + 1)});
    add_run({std::min(seen(1), Sizes::coarse * (count - 1) + reach + 1), seen(1)});
  }

  void score_fine(int64_t part, int64_t of) {
    if (!chooses()) return;
    for (const Run& run : runs) {
      Run mine = part_of(run, part, of);
      multiply_rows<L>(q.data(), fine, mine, sizes.head_dim, fine_scores.data() + mine.begin);
    }
  }

  void choose() {
    blocks.clear();
    if (at < 0) return;
    int64_t own = at / sizes.block_size;
    auto take = [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) blocks.push_back(block);
    };
    if (!chooses()) return take(0, own + 1);
    share_fine();
    Run free = {sizes.init_blocks, own - sizes.local_blocks + 1};
    score_blocks(free);
    largest_of(best, free, sizes.num_blocks - sizes.init_blocks - sizes.local_blocks);
    take(0, free.begin);
    blocks.insert(blocks.end(), order.begin(), order.end());
    take(free.end, own + 1);
  }

  void attend(int64_t part, int64_t of) {
    Part<L>& mine = parts[part];
    mine.begin(sizes.head_dim);
    Run run = part_of({0, (int64_t)blocks.size()}, part, of);
    for (int64_t i = run.begin; i < run.end; i++) {
      int64_t end = std::min(at + 1, (blocks[i] + 1) * sizes.block_size);
      for (int64_t token = blocks[i] * sizes.block_size; token < end; token += tile) {
        int64_t next = token + tile < end || i + 1 == run.end ? token + tile : blocks[i + 1] * sizes.block_size;
        attend(token, std::min(tile, end - token), std::min(next, at), mine);
      }
    }
  }

  void end(float* out, int64_t apart) {
    if (at < 0) {
      for (int64_t head = 0; head < heads; head++) std::fill_n(out + head * apart, sizes.head_dim, 0.0f);
      return;
    }
    put_together<L>(parts, out, 0, heads, apart);
  }

 private:
  void add_run(Run run) {
    if (!runs.empty() && runs.back().end >= run.begin) runs.back().end = std::max(runs.back().end, run.end);
    else if (run.begin < run.end) runs.push_back(run);
  }

  // What the group gives each window of a run together, from weights and what to multiply each head's by.
  void share(const std::vector<Floats>& weights, Run run, Floats times) {
    if ((int64_t)shares.size() < run.end) shares.resize(run.end);
    for (int lane = heads; lane < L::count; lane++) times[lane] = 0;
    for (int64_t window = run.begin; window < run.end; window++) {
      Floats product = weights[window] * times;
      float sum = sum_of<L::count>((const float*)&product);
      shares[window] = sum > 0 ? sum : 0;  // no number cannot be compared
    }
  }

  void share_fine() {
    shares.assign(seen(1), 0);
    if (use_coarse()) {
      for (const Run& run : runs) {
        for (int64_t window = run.begin; window < run.end; window++) {
          Floats above = fine_scores[window] - total;  // bounded, so that the sum of a group stays finite
          fine_scores[window] = exp_of<L>(above > 60.0f ? Floats{} + 60.0f : above);
        }
        share(fine_scores, run, Floats{} + 1);
      }
      return;
    }
    Floats largest = Floats{} - std::numeric_limits<float>::infinity(), sum = {};
    for (const Floats& score : fine_scores) largest = score > largest ? score : largest;
    for (Floats& score : fine_scores) score = exp_of<L>(score - largest), sum += score;
    share(fine_scores, runs[0], 1 / sum);
  }

  // A block gets what the best window that overlaps it has, which may begin in the block before.
  void score_blocks(Run of) {
    int64_t per_block = sizes.block_size / sizes.kernel_stride;
    int64_t before = sizes.kernel_size / sizes.kernel_stride - 1;
    best.resize(of.end);
    for (int64_t block = of.begin; block < of.end; block++) {
      int64_t first = std::max<int64_t>(0, block * per_block - before);
      int64_t last = std::min<int64_t>(shares.size(), (block + 1) * per_block);
      best[block] = 0;
      for (int64_t window = first; window < last; window++) best[block] = std::max(best[block], shares[window]);
    }
  }

  // In `order`, sorted: the places of a run with the largest numbers; of equal ones the earlier.
  void largest_of(const std::vector<float>& numbers, Run run, int64_t most) {
    order.clear();
    for (int64_t i = run.begin; i < run.end; i++) order.push_back(i);
    if (most < (int64_t)order.size()) {
      std::nth_element(order.begin(), order.begin() + most, order.end(), [&](int64_t one, int64_t other) {
        return numbers[one] > numbers[other] || (numbers[one] == numbers[other] && one < other);
      });
      order.resize(most);
    }
    std::sort(order.begin(), order.end());
  }

  // Some tokens, met together; meanwhile of those at `next` the first are fetched.
  void attend(int64_t token, int64_t count, int64_t next, Part<L>& part) {
    Floats weights[tile];
    int64_t dim = sizes.head_dim, end = token + count;
    for (int64_t i = token, run; i < end; i += run) {
      run = key.run(i, end);
      multiply_all<L>(q.data(), key.at(i), run, key.apart, dim, weights + i - token, value.at(i));
    }
    part.rise(weights, count), part.weigh(weights, count);
    for (int64_t i = token, run; i < end; i += run) {
      run = value.run(i, end);
      add_all<L>(weights + i - token, value.at(i), run, value.apart, dim, part.out.data(), key.at(next));
    }
  }
};

// ---------------------------------------------------------------------------------------------- pages

// A text in pages, for one key-value head, and the new tokens behind it, which may be guesses: a tree.
struct Paged {
  const float *key, *value;  // of slot 0
  int64_t apart;  // numbers from a slot to the next
  const int64_t* table;  // its pages
  int64_t page_size, length;
  const int64_t *positions, *slots;  // of the new tokens
  const bool* among;  // which of them each one sees; what does not see itself is no token
  int64_t count;  // of new tokens, with what fills up behind them

  int64_t tokens() const {
    int64_t found = 0;
    while (found < count && among[found * count + found]) found++;
    return found;
  }
};

// Some of the new tokens, as many as lanes have room for: each meets all of the text, and of the new tokens those
// that it sees. What stands in a page is met together, with the new tokens whose place is in it, and so many pages
// are a part of the softmax: nothing depends on which tokens come in the same call, or on the threads.
template <class L>
class Newest {
  using Floats = typename L::Floats;
  static constexpr int64_t part_tokens = 256;

  Paged text;
  int64_t head_dim, first, queries, group;  // new tokens from the first on, each with a group of heads
  std::vector<Floats> q;
  std::vector<int64_t> order;  // the new tokens, by their positions
  std::vector<Part<L>> softmax;

  int64_t pages_of_part() const { return std::max<int64_t>(1, part_tokens / text.page_size); }

 public:
  // `from`: the first head's query of the first new token; heads lie `apart` numbers from each other.
  Newest(const Paged& text, const float* from, int64_t apart, int64_t head_dim, int64_t first, int64_t queries,
         int64_t group)
      : text(text), head_dim(head_dim), first(first), queries(queries), group(group), q(head_dim, Floats{}) {
    float scale = 1 / std::sqrt((float)head_dim);
    for (int64_t i = 0; i < queries; i++)
      for (int64_t head = 0; head < group; head++)
        for (int64_t d = 0; d < head_dim; d++)
          q[d][i * group + head] = from[head * apart + (first + i) * head_dim + d] * scale;
    for (int64_t i = 0; i < text.tokens(); i++) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t one, int64_t other) { return text.positions[one] < text.positions[other]; });
    int64_t last = order.empty() ? text.length - 1 : text.positions[order.back()];
    softmax.resize(last / (text.page_size * pages_of_part()) + 1);
  }

  int64_t parts() const { return softmax.size(); }

  void attend(int64_t part) {
    Part<L>& mine = softmax[part];
    mine.begin(head_dim);
    std::vector<Floats> weights(text.page_size + text.count);
    int64_t next = 0;  // in the order of new tokens
    int64_t page = part * pages_of_part(), end = page + pages_of_part(), size = text.page_size;
    while (next < (int64_t)order.size() && text.positions[order[next]] < page * size) next++;
    for (; page < end; page++) {
      int64_t old = std::min(size, text.length - page * size), start = next;
      while (next < (int64_t)order.size() && text.positions[order[next]] < (page + 1) * size) next++;
      if (old <= 0 && start == next) break;
      old = std::max<int64_t>(0, old);
      int64_t slot = old ? text.table[page] * size * text.apart : 0;
      int64_t ahead = (page + 1) * size < text.length ? text.table[page + 1] * size * text.apart : slot;
      multiply_all<L>(q.data(), text.key + slot, old, text.apart, head_dim, weights.data(), text.value + slot);
      for (int64_t i = start; i < next; i++) {
        const float* own = text.key + text.slots[order[i]] * text.apart;
        Floats& score = weights[old + i - start];
        multiply<L, 1>(q.data(), own, text.apart, head_dim, &score, own);
        each_blind(order[i], [&](int64_t lane) { score[lane] = Part<L>::nothing; });
      }
      mine.rise(weights.data(), old + next - start);
      mine.weigh(weights.data(), old);
      for (int64_t i = start; i < next; i++) {  // what a lane does not see weighs nothing
        Floats& weight = weights[old + i - start];
        weight = exp_of<L>(weight - mine.largest);
        each_blind(order[i], [&](int64_t lane) { weight[lane] = 0; });
        mine.sum += weight;
      }
      add_all<L>(weights.data(), text.value + slot, old, text.apart, head_dim, mine.out.data(), text.key + ahead);
      for (int64_t i = start; i < next; i++) {
        const float* own = text.value + text.slots[order[i]] * text.apart;
        add<L, 1>(&weights[old + i - start], own, text.apart, head_dim, mine.out.data(), own);
      }
    }
  }

  // `out`: of the first head and the first new token.
  void end(float* out, int64_t apart) {
    for (int64_t i = 0; i < queries; i++)
      put_together<L>(softmax, out + (first + i) * head_dim, i * group, group, apart);
  }

 private:
  // The lanes of queries that do not see a new token.
  template <class Do>
  void each_blind(int64_t token, Do act) {
    for (int64_t i = 0; i < queries; i++)
      if (!text.among[(first + i) * text.count + token])
        for (int64_t head = 0; head < group; head++) act(i * group + head);
  }
};

// ---------------------------------------------------------------------------------------------- operator

// Acts with the narrowest lanes that have room for so many heads.
template <class Act>
void with_lanes(int64_t heads, Act act) {
  if (heads <= 4) act(Lanes<4>{});
  else if (heads <= 8) act(Lanes<8>{});
  else if (heads <= 16) act(Lanes<16>{});
  else act(Lanes<32>{});
}

// A tensor (batch, kv_heads, tokens, head_dim) whose tokens of a head lie behind each other.
struct Text {
  Tensor tensor;
  const float* data;
  int64_t heads, tokens, row, head;

  explicit Text(const Tensor& given)
      : tensor(given.stride(3) == 1 && given.stride(2) == given.size(3) ? given : torch::stable::contiguous(given)),
        data((const float*)tensor.const_data_ptr()), heads(tensor.size(1)), tokens(tensor.size(2)),
        row(tensor.stride(0)), head(tensor.stride(1)) {}
  Rows of(int64_t row, int64_t head, int64_t first = 0) const {
    int64_t apart = tensor.size(3);
    return {data + row * this->row + head * this->head + first * apart, apart};
  }
};

template <class L>
void attend_all(const Tensor& query, const Text& key, const Text& value, const Text& fine, const Text& coarse,
                const Tensor& starts, const Sizes& sizes, float* out) {
  int64_t heads = query.size(1), queries = query.size(2), kv_heads = key.heads, keys = key.tokens;
  int64_t group = heads / kv_heads, items = query.size(0) * kv_heads * queries, apart = queries * sizes.head_dim;
  const float* from = (const float*)query.const_data_ptr();
  const int64_t* start = (const int64_t*)starts.const_data_ptr();
  auto place = [&](int64_t item) {  // of its first head in query and out
    return (item / queries * group * queries + item % queries) * sizes.head_dim;
  };
  auto begin = [&](Query<L>& one, int64_t item, int64_t split) {
    int64_t row = item / queries / kv_heads, head = item / queries % kv_heads;
    int64_t first = starts.size(0) > 1 ? start[row] : start[0], at = keys - queries + item % queries - first;
    one.begin(from + place(item), apart, group, at, key.of(row, head, first), value.of(row, head, first),
              fine.of(row, head), coarse.of(row, head), split);
  };
  int64_t threads = torch::stable::get_num_threads(), split = (threads + items - 1) / items;
  if (split == 1) {
    torch::stable::parallel_for(0, items, 1, [&](int64_t first, int64_t last) {
      Query<L> one(sizes);
      for (int64_t item = first; item < last; item++) {
        begin(one, item, 1);
        one.score_coarse(0, 1), one.look_closer(), one.score_fine(0, 1), one.choose(), one.attend(0, 1);
        one.end(out + place(item), apart);
      }
    });
    return;
  }
  std::vector<Query<L>> all;
  for (int64_t item = 0; item < items; item++) begin(all.emplace_back(sizes), item, split);
  auto shared_out = [&](auto step) {
    torch::stable::parallel_for(0, items * split, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) step(all[i / split], i % split);
    });
  };
  shared_out([&](Query<L>& one, int64_t part) { one.score_coarse(part, split); });
  for (Query<L>& one : all) one.look_closer();
  shared_out([&](Query<L>& one, int64_t part) { one.score_fine(part, split); });
  for (Query<L>& one : all) one.choose();
  shared_out([&](Query<L>& one, int64_t part) { one.attend(part, split); });
  for (int64_t item = 0; item < items; item++) all[item].end(out + place(item), apart);
}

Tensor sparse_attention(Tensor query, Tensor key, Tensor value, Tensor fine, Tensor coarse, Tensor starts,
                        int64_t kernel_size, int64_t kernel_stride, int64_t block_size, int64_t init_blocks,
                        int64_t local_blocks, int64_t num_blocks, int64_t all_visible, bool approximate,
                        int64_t coarse_topk) {
  query = torch::stable::contiguous(query);
  starts = torch::stable::contiguous(starts);
  Tensor out = torch::stable::empty_like(query);
  Sizes sizes{kernel_size, kernel_stride, block_size,  init_blocks, local_blocks,
              num_blocks,  all_visible,   coarse_topk, approximate, query.size(3)};
  with_lanes(query.size(1) / key.size(1), [&](auto lanes) {
    attend_all<decltype(lanes)>(query, Text(key), Text(value), Text(fine), Text(coarse), starts, sizes,
                                (float*)out.mutable_data_ptr());
  });
  return out;
}

// Texts in pages, one of a row each, as the operators are given them.
struct PagedTexts {
  Tensor query, key, value, tables, lengths, positions, slots, among;
  int64_t page_size;
  int64_t rows, heads, count, dim, kv_heads, group;  // count: of new tokens

  PagedTexts(Tensor query, Tensor key, Tensor value, Tensor tables, Tensor lengths, Tensor positions, Tensor slots,
             Tensor among, int64_t page_size)
      : query(torch::stable::contiguous(query)), key(key), value(value), tables(torch::stable::contiguous(tables)),
        lengths(torch::stable::contiguous(lengths)), positions(torch::stable::contiguous(positions)),
        slots(torch::stable::contiguous(slots)), among(torch::stable::contiguous(among)), page_size(page_size),
        rows(query.size(0)), heads(query.size(1)), count(query.size(2)), dim(query.size(3)), kv_heads(key.size(1)),
        group(heads / kv_heads) {}

  const float* of(const Tensor& tensor, int64_t head) const { return (const float*)tensor.const_data_ptr() + head * dim; }

  Paged text(int64_t row, int64_t head) const {
    return {of(key, head),
            of(value, head),
            kv_heads * dim,
            (const int64_t*)tables.const_data_ptr() + row * tables.size(1),
            page_size,
            ((const int64_t*)lengths.const_data_ptr())[row],
            (const int64_t*)positions.const_data_ptr() + row * count,
            (const int64_t*)slots.const_data_ptr() + row * count,
            (const bool*)among.const_data_ptr() + row * count * count,
            count};
  }

  // Of the first head that a key-value head serves, in query and out.
  int64_t place(int64_t row, int64_t head) const { return (row * heads + head * group) * count * dim; }
  const float* queries(int64_t place) const { return (const float*)query.const_data_ptr() + place; }
};

template <class L>
void attend_pages(const PagedTexts& texts, float* out) {
  int64_t count = texts.count, dim = texts.dim, at_once = L::count / texts.group;
  std::vector<Newest<L>> all;
  std::vector<int64_t> places;
  std::vector<std::pair<int64_t, int64_t>> work;
  for (int64_t row = 0; row < texts.rows; row++)
    for (int64_t head = 0; head < texts.kv_heads; head++) {
      Paged text = texts.text(row, head);
      int64_t tokens = text.tokens();
      for (int64_t first = 0; first < tokens; first += at_once) {
        places.push_back(texts.place(row, head));
        all.emplace_back(text, texts.queries(places.back()), count * dim, dim, first,
                         std::min(at_once, tokens - first), texts.group);
        for (int64_t part = 0; part < all.back().parts(); part++) work.emplace_back(all.size() - 1, part);
      }
    }
  torch::stable::parallel_for(0, work.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) all[work[i].first].attend(work[i].second);
  });
  for (size_t i = 0; i < all.size(); i++) all[i].end(out + places[i], count * dim);
}

Tensor paged_attention(Tensor query, Tensor key, Tensor value, Tensor tables, Tensor lengths, Tensor positions,
                       Tensor slots, Tensor among, int64_t page_size) {
  PagedTexts texts(query, key, value, tables, lengths, positions, slots, among, page_size);
  Tensor out = torch::stable::empty_like(texts.query);
  if (texts.count > 1) torch::stable::zero_(out);  // what fills up a row stays so
  // lanes that fill one register, if a group does, are faster than all queries at once
  int64_t most = std::max<int64_t>(texts.group, 16);
  with_lanes(std::min(most, texts.group * texts.count), [&](auto lanes) {
    attend_pages<decltype(lanes)>(texts, (float*)out.mutable_data_ptr());
  });
  return out;
}

// The guess that a query stands for, and those before it, make windows of their own, whose means are taken here.
struct Tail {
  std::vector<const float*> keys, values, fine, coarse;
  std::vector<float> means;

  void take_means(const Rows& key, const Sizes& sizes, int64_t length, int64_t at) {
    int64_t times[] = {1, Sizes::coarse}, dim = sizes.head_dim, most = 0;
    for (int64_t each : times) most += std::max<int64_t>(0, sizes.windows(at + 1, each) - sizes.windows(length, each));
    means.assign(most * dim, 0);
    float* to = means.data();
    for (int64_t each : times) {
      std::vector<const float*>& found = each == 1 ? fine : coarse;
      found.clear();
      int64_t size = each * sizes.kernel_size, stride = each * sizes.kernel_stride;
      for (int64_t window = sizes.windows(length, each); window < sizes.windows(at + 1, each); window++, to += dim) {
        for (int64_t i = 0; i < size; i++)
          for (int64_t d = 0; d < dim; d++) to[d] += key.at(window * stride + i)[d];
        for (int64_t d = 0; d < dim; d++) to[d] /= size;
        found.push_back(to);
      }
    }
  }
};

template <class L>
void attend_chosen_pages(const PagedTexts& texts, const Tensor& fine, const Tensor& coarse, const Sizes& sizes,
                         float* out) {
  int64_t count = texts.count, dim = texts.dim, kv_heads = texts.kv_heads;
  torch::stable::parallel_for(0, texts.rows * kv_heads * count, 1, [&](int64_t begin, int64_t end) {
    Query<L> one(sizes);
    Tail tail;
    for (int64_t item = begin; item < end; item++) {
      int64_t row = item / count / kv_heads, head = item / count % kv_heads, new_token = item % count;
      Paged text = texts.text(row, head);
      const bool* sees = text.among + new_token * count;
      int64_t at = sees[new_token] ? text.positions[new_token] : -1;
      tail.keys.clear(), tail.values.clear();
      for (int64_t i = 0; i < count; i++)  // those before a guess have lower places than it
        if (sees[i]) {
          tail.keys.push_back(text.key + text.slots[i] * text.apart);
          tail.values.push_back(text.value + text.slots[i] * text.apart);
        }
      Rows keys{text.key, text.apart, text.table, text.page_size, 0, text.length, &tail.keys};
      Rows values{text.value, text.apart, text.table, text.page_size, 0, text.length, &tail.values};
      if (at >= sizes.all_visible) tail.take_means(keys, sizes, text.length, at);
      auto windows = [&](const Tensor& means, int64_t times, const std::vector<const float*>& own) {
        int64_t stride = times * sizes.kernel_stride, skip = (times * sizes.kernel_size - 1) / stride;
        return Rows{texts.of(means, head), text.apart, text.table, text.page_size / stride, skip,
                    sizes.windows(text.length, times), &own};
      };
      int64_t place = texts.place(row, head) + new_token * dim;
      one.begin(texts.queries(place), count * dim, texts.group, at, keys, values, windows(fine, 1, tail.fine),
                windows(coarse, Sizes::coarse, tail.coarse), 1);
      one.score_coarse(0, 1), one.look_closer(), one.score_fine(0, 1), one.choose(), one.attend(0, 1);
      one.end(out + place, count * dim);
    }
  });
}

Tensor sparse_paged_attention(Tensor query, Tensor key, Tensor value, Tensor fine, Tensor coarse, Tensor tables,
                              Tensor lengths, Tensor positions, Tensor slots, Tensor among, int64_t page_size,
                              int64_t kernel_size, int64_t kernel_stride, int64_t block_size, int64_t init_blocks,
                              int64_t local_blocks, int64_t num_blocks, int64_t all_visible, bool approximate,
                              int64_t coarse_topk) {
  PagedTexts texts(query, key, value, tables, lengths, positions, slots, among, page_size);
  Tensor out = torch::stable::empty_like(texts.query);
  Sizes sizes{kernel_size, kernel_stride, block_size,  init_blocks, local_blocks,
              num_blocks,  all_visible,   coarse_topk, approximate, texts.dim};
  with_lanes(texts.group, [&](auto lanes) {
    attend_chosen_pages<decltype(lanes)>(texts, fine, coarse, sizes, (float*)out.mutable_data_ptr());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minicpm_lite, library) {
  library.def(
      "sparse_attention(Tensor query, Tensor key, Tensor value, Tensor fine, Tensor coarse, Tensor starts, "
      "int kernel_size, int kernel_stride, int block_size, int init_blocks, int local_blocks, int num_blocks, "
      "int all_visible, bool approximate, int coarse_topk) -> Tensor");
  library.def(
      "sparse_paged_attention(Tensor query, Tensor key, Tensor value, Tensor fine, Tensor coarse, Tensor tables, "
      "Tensor lengths, Tensor positions, Tensor slots, Tensor among, int page_size, int kernel_size, "
      "int kernel_stride, int block_size, int init_blocks, int local_blocks, int num_blocks, int all_visible, "
      "bool approximate, int coarse_topk) -> Tensor");
  library.def(
      "paged_attention(Tensor query, Tensor key, Tensor value, Tensor tables, Tensor lengths, Tensor positions, "
      "Tensor slots, Tensor among, int page_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minicpm_lite, CPU, library) {
  library.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  library.impl("sparse_paged_attention", TORCH_BOX(&sparse_paged_attention));
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
}
