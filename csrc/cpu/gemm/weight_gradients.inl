// Gradients of weights and biases: sums over all rows of a call.
namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

// The weight gradients are products over all rows of a call. A block of such a product is so many of those rows
// deep (384 floats: 1 % quicker than 256), so many columns of dz high, whose packed form stays in the second-level
// cache, and so many panels wide, so that little of dz is packed twice.
template <typename T>
constexpr int64_t kGradientDepth = 1536 / sizeof(T);
constexpr int64_t kGradientHeight = 16 * kRows;
constexpr int64_t kGradientPanels = 2048 / (kPanelVectors * LLM_EXT_VECTOR_BYTES);

// Factors, of both sides, of a block of the weight gradients.
template <typename T>
constexpr int64_t kGradientBlock = kGradientDepth<T> * (kGradientHeight + kGradientPanels * kPanel<T>);

// A weight gradient: sum over all rows of left(row)^T right(row).
template <typename S>
struct WeightGradient {
  Compute<S>* dw;  // [gates * height, width]; null: not wanted
  int64_t width;   // of a row of the right side
  int gates[4];    // which of its blocks of `height` rows each block of the left side belongs to; -1: none
  bool gathered;   // the rows of the right side are found one by one, else at `right`
  const S* right;  // [N, width], `stride` apart
  int64_t stride;
};

// Of rows [rows), whose left sides lie at `left_rows`; on top of what the gradients hold if `more`. gather(first)
// returns a function that is asked for rows first + i of a gathered side, in rising order; null means zeros. Gradients
// that have the left side [*, blocks * height] in common are one product with their right sides side by side, so that
// the left side is packed once.
template <typename S, int kSides, typename Gather>
static void weight_gradients(Gather gather, Range rows, const Factor<S>* left_rows, int64_t height, int blocks,
                             const WeightGradient<S> (&sides)[kSides], bool more, Factor<S>* space, const ThreadTeam& team) {
  using T = Compute<S>;
  using L = Factor<S>;
  const int64_t n = rows.size();
  const int64_t left_width = blocks * height;
  Range places[kSides];  // of each side among the panels of all
  Range panels = {0, 0};
  for (int j = 0; j < kSides; ++j) {
    const int64_t wanted = sides[j].dw == nullptr ? 0 : panels_of<T>(sides[j].width);
    places[j] = {panels.end, panels.end + wanted};
    panels.end += wanted;
  }
  Range heights = {0, height};
  if (panels.end >= 2 * team.size) {
    panels = team.share(panels.end);
  } else {
    heights = team.share(height, kRows);
  }
  if (n == 0) {
    for (const WeightGradient<S>& side : sides) {
      if (side.dw == nullptr) continue;
      int used = 0;
      for (int b = 0; b < blocks; ++b) used += side.gates[b] >= 0;
      const Range part = team.share(used * height * side.width);
      __builtin_memset(side.dw + part.begin, 0, part.size() * sizeof(T));
    }
    return;
  }
  L* right = space;
  L* left = space + kGradientDepth<T> * kGradientPanels * kPanel<T>;
  for (int64_t i = 0; i < n; i += kGradientDepth<T>) {
    const int64_t depth = n - i < kGradientDepth<T> ? n - i : kGradientDepth<T>;
    for (int64_t begin = panels.begin; begin < panels.end; begin += kGradientPanels) {
      const Range group = intersect({begin, begin + kGradientPanels}, panels);
      // Calls body(side, its panels of the group, their columns, their place in `right`).
      const auto for_each_side = [&](auto body) {
        for (int j = 0; j < kSides; ++j) {
          const Range mine = intersect(group, places[j]);
          if (mine.size() == 0) continue;
          const int64_t first = (mine.begin - places[j].begin) * kPanel<T>;
          const Range columns = intersect({first, first + mine.size() * kPanel<T>}, {0, sides[j].width});
          body(sides[j], Range{0, mine.size()}, columns,
               right + (mine.begin - group.begin) * kPanel<T> * padded<L>(depth));
        }
      };
      for_each_side([&](const WeightGradient<S>& side, Range some, Range columns, L* packed) {
        for (int64_t j = some.begin; j < some.end; ++j) {
          auto gathered = gather(rows.begin + i);
          const auto row = [&](int64_t k) -> const S* {
            const S* source = side.gathered ? gathered(k) : side.right + (rows.begin + i + k) * side.stride;
            return source == nullptr ? nullptr : source + columns.begin;
          };
          pack_rows(row, columns.size(), depth, {j, j + 1}, packed);
        }
      });
      for (int b = 0; b < blocks; ++b) {
        for (int64_t r = heights.begin; r < heights.end; r += kGradientHeight) {
          const Range some_height = intersect({r, r + kGradientHeight}, heights);
          pack_columns(left_rows + i * left_width, left_width, depth,
                       {b * height + some_height.begin, b * height + some_height.end}, left);
          for_each_side([&](const WeightGradient<S>& side, Range some, Range columns, const L* packed) {
            if (side.gates[b] < 0) return;
            T* target = side.dw + (side.gates[b] * height + r) * side.width + columns.begin;
            product(
                PackedColumns<L>{left}, some_height.size(), depth, packed, columns.size(), Panels{some},
                [&](int64_t m, int64_t col) { __builtin_prefetch(target + m * side.width + col, 1); },
                [&](int64_t m, int64_t col, Vec<T> value, int lanes) {
                  T* out = target + m * side.width + col;
                  store_part(out, i == 0 && !more ? value : value + load_part(out, lanes), lanes);
                });
          });
        }
      }
    }
  }
}

// Column sums of n rows, `stride` apart, into one or both of two places, null for neither; on top of what they hold if
// `more`. All of it by the calling thread.
template <typename T, typename L>
static void column_sums(const L* rows, int64_t n, int64_t stride, int64_t width, T* first, T* second, bool more) {
  constexpr int64_t kSums = 8;
  constexpr int64_t kWidth = kSums * kLanes<T>;
  if (first == nullptr) first = second;
  if (second == nullptr) second = first;
  if (first == nullptr) return;
  for (int64_t c = 0; c < width; c += kWidth) {
    const int64_t count = width - c < kWidth ? width - c : kWidth;
    Vec<T> sums[kSums] = {};
    for_each_vector<T>(count, [&](int64_t j, int lanes) {
      if (more) sums[j / kLanes<T>] = load_part(first + c + j, lanes);
    });
    for (int64_t i = 0; i < n; ++i) {
      for_each_vector<T>(
          count, [&](int64_t j, int lanes) { sums[j / kLanes<T>] += load_part(rows + i * stride + c + j, lanes); });
    }
    for_each_vector<T>(count, [&](int64_t j, int lanes) {
      store_part(first + c + j, sums[j / kLanes<T>], lanes);
      store_part(second + c + j, sums[j / kLanes<T>], lanes);
    });
  }
}

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
