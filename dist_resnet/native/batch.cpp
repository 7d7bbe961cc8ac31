// What is done to a batch before the model sees it: random choices, crop, flip, normalisation, cutout
// and mixup.
//
// The results are those of augment/pipeline.py by torch, bit for bit where torch uses vectors:
// compile without contraction of products and sums, for the only fused ones are those of torch.lerp.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

// Output number `index` of SplitMix64 (Steele, Lea and Flood 2014) that starts at `state`.
inline uint64_t splitmix64(uint64_t state, uint64_t index) {
  uint64_t bits = state + (index + 1) * 0x9E3779B97F4A7C15u;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

// Window of the zero-padded image whose corner is at (top, left) of the image itself.
void crop(const uint8_t* image, uint8_t* out, int64_t height, int64_t width, int64_t top,
          int64_t left, bool mirrored) {
  const int64_t begin = std::clamp(-left, int64_t(0), width);
  const int64_t end = std::clamp(width - left, begin, width);
  for (int64_t r = 0; r < height; ++r, out += 3 * width) {
    const int64_t from = r + top;
    if (from < 0 || from >= height || begin == end) {
      std::memset(out, 0, 3 * width);
      continue;
    }
    const uint8_t* pixel = image + 3 * (from * width + begin + left);
    if (mirrored) {
      std::memset(out + 3 * (width - begin), 0, 3 * begin);
      std::memset(out, 0, 3 * (width - end));
      for (int64_t c = begin; c < end; ++c, pixel += 3)
        std::memcpy(out + 3 * (width - 1 - c), pixel, 3);
    } else {
      std::memset(out, 0, 3 * begin);
      std::memset(out + 3 * end, 0, 3 * (width - end));
      std::memcpy(out + 3 * begin, pixel, 3 * (end - begin));
    }
  }
}

struct Hole {
  int64_t top, bottom, left, right;  // empty where bottom <= top
};

inline Hole hole(const int64_t* tops, const int64_t* lefts, int64_t i, int64_t side) {
  if (!side) return {};
  const int64_t top = tops[i] - side / 2, left = lefts[i] - side / 2;
  return {top, top + side, left, left + side};
}

// One row of 3 width values, zero in the hole.
inline void normalise(const uint8_t* row, float* __restrict out, int64_t width, const float* mean,
                      const float* scale, int64_t r, const Hole& h) {
  for (int64_t k = 0; k < 3 * width; ++k) out[k] = (float(row[k]) - mean[k]) * scale[k];
  if (r < h.top || r >= h.bottom) return;
  const int64_t begin = std::max(h.left, int64_t(0)), end = std::min(h.right, width);
  for (int64_t k = 3 * begin; k < 3 * end; ++k) out[k] = 0;
}

// lam * own + (1 - lam) * other with the roundings of torch.lerp, in place of `own`.
inline void mix(float* __restrict own, const float* __restrict other, int64_t count, float lam) {
  if (lam < 0.5f)
    for (int64_t k = 0; k < count; ++k)
      own[k] = std::fma(lam, own[k] - other[k], other[k]);
  else
    for (int64_t k = 0; k < count; ++k)
      own[k] = std::fma(lam - 1.0f, own[k] - other[k], own[k]);
}

}  // namespace

// A replica's choices, as augment.ChoiceDrawer has them. integers: (5, n), rows of top, left, cut_top, cut_left
// and partner; a bound of 0 leaves its row as it is. quantiles: (2^16), or null without mixup.
// keep: (n, features), 0 where a lane is below `dropped`, else `factor`.
extern "C" void draw_choices(const int64_t* key, const int64_t* samples, int64_t n, int64_t shifts,
                             int64_t cut_height, int64_t cut_width, const float* quantiles,
                             int64_t features, int64_t dropped, float factor, int64_t* integers,
                             bool* flip, float* lam, float* keep) {
  enum { kTop, kLeft, kFlip, kCutTop, kCutLeft, kPartner, kLam, kDropout };
  int64_t *top = integers, *left = top + n, *cut_top = left + n, *cut_left = cut_top + n;
  int64_t* partner = cut_left + n;
  std::vector<uint64_t> order(n);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t state = splitmix64(*key, samples[i]);
    const auto lane = [state](uint64_t index) { return splitmix64(state, index) >> 32; };
    const auto below = [&lane](uint64_t index, int64_t bound) {
      return int64_t((lane(index) * uint64_t(bound)) >> 32);
    };
    if (shifts) top[i] = below(kTop, shifts), left[i] = below(kLeft, shifts);
    flip[i] = lane(kFlip) < (uint64_t(1) << 31);
    if (cut_height) cut_top[i] = below(kCutTop, cut_height), cut_left[i] = below(kCutLeft, cut_width);
    order[i] = lane(kPartner);
    if (quantiles && i == 0) *lam = quantiles[below(kLam, 1 << 16)];
    for (int64_t f = 0; f < features; ++f)
      keep[i * features + f] = int64_t(lane(kDropout + f)) < dropped ? 0.0f : factor;
  }
  if (!quantiles) return;
  std::iota(partner, partner + n, int64_t(0));
  std::stable_sort(partner, partner + n,
                   [&order](int64_t a, int64_t b) { return order[a] < order[b]; });
}

// images, scratch: (n, height, width, 3); out: the same shape. Null: top and left together, flip,
// partner and lam together, where that augmentation is off; side is 0 without cutout.
extern "C" void augment(const uint8_t* images, uint8_t* scratch, float* out, int64_t n,
                        int64_t height, int64_t width, const int64_t* top, const int64_t* left,
                        int64_t padding, const bool* flip, const int64_t* cut_top,
                        const int64_t* cut_left, int64_t side, const int64_t* partner,
                        const float* lam, const float* mean, const float* scale, int threads) {
  const int64_t size = 3 * height * width;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i)
      crop(images + i * size, scratch + i * size, height, width, top ? top[i] - padding : 0,
           left ? left[i] - padding : 0, flip && flip[i]);
    std::vector<float> other(3 * width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = partner ? partner[i] : i;
      const Hole own_hole = hole(cut_top, cut_left, i, side);
      const Hole other_hole = hole(cut_top, cut_left, j, side);
      for (int64_t r = 0; r < height; ++r) {
        float* row = out + i * size + r * 3 * width;
        const int64_t at = r * 3 * width;
        normalise(scratch + i * size + at, row, width, mean, scale, r, own_hole);
        if (j == i) continue;  // lerp of equals is exact
        normalise(scratch + j * size + at, other.data(), width, mean, scale, r, other_hole);
        mix(row, other.data(), 3 * width, *lam);
      }
    }
  }
}
