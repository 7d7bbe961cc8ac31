// BatchNorm of a training step together with what follows it: addition of a shortcut, ReLU.
//
// x is (rows, C), a channels-last tensor, in float or bfloat16; sums are float within a piece of
// the rows and double over the pieces. The pieces do not follow the number of threads, so neither
// do the results. Formulas: Ioffe and Szegedy 2015, with batch statistics.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kPieces = 32;
constexpr int kLanes = 16;

struct bfloat {
  uint16_t bits;
};

// 16 values at a time, whatever vector registers the machine has. Addresses need no alignment.
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef float AnyFloats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t AnyHalves __attribute__((vector_size(32), aligned(2), may_alias));

inline Floats load(const float* p) { return *(const AnyFloats*)p; }
inline Floats load(const bfloat* p) {
  return (Floats)(__builtin_convertvector(*(const AnyHalves*)p, Words) << 16);
}

inline void store(float* p, Floats v) { *(AnyFloats*)p = v; }
inline void store(bfloat* p, Floats v) {
  Words bits = (Words)v;
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  bits = v != v ? Words{} + 0x7fc0u : bits;             // a NaN stays one: divergence is told by it
  *(AnyHalves*)p = __builtin_convertvector(bits, AnyHalves);
}

inline float scalar(float v) { return v; }
inline float scalar(bfloat v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Several rows of few channels make one wide row of W values, so that V sums run side by side.
template <int C>
struct Wide {
  static constexpr int W = C < 64 ? 64 : C;
  static constexpr int V = W / kLanes;
  static_assert(W % C == 0 && W % kLanes == 0);
};

struct Piece {
  int64_t begin, end;
};
inline Piece piece(int64_t rows, int p) {
  return {rows * p / kPieces, rows * (p + 1) / kPieces};
}

#define FOR_VECTORS _Pragma("GCC unroll 8") for (int v = 0; v < V; ++v)
#define FOR_PIECES \
  _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)") \
  for (int p = 0; p < kPieces; ++p)

// Sums of x - pivot and of its square: a value of the tensor as pivot keeps the variance exact where
// the mean is large.
template <typename T, int V>
void moments(const T* __restrict x, Piece r, const float* pivot, float* sum, float* square) {
  Floats s[V] = {}, q[V] = {}, m[V];
  FOR_VECTORS m[v] = load(pivot + v * kLanes);
  for (int64_t i = r.begin; i < r.end; ++i)
    FOR_VECTORS {
      const Floats d = load(x + (i * V + v) * kLanes) - m[v];
      s[v] += d;
      q[v] += d * d;
    }
  FOR_VECTORS {
    store(sum + v * kLanes, s[v]);
    store(square + v * kLanes, q[v]);
  }
}

template <typename T, int V, bool kRelu, bool kShortcut>
void apply(const T* __restrict x, const T* __restrict shortcut, T* __restrict y, Piece r,
           const float* scale, const float* shift) {
  Floats a[V], b[V];
  FOR_VECTORS {
    a[v] = load(scale + v * kLanes);
    b[v] = load(shift + v * kLanes);
  }
  for (int64_t i = r.begin; i < r.end; ++i)
    FOR_VECTORS {
      const int64_t at = (i * V + v) * kLanes;
      Floats z = load(x + at) * a[v] + b[v];
      if (kShortcut) z += load(shortcut + at);
      if (kRelu) z = z < 0 ? Floats{} : z;
      store(y + at, z);
    }
}

// Sums of g and of g (x - mean), g being the gradient before the ReLU. Without a shortcut the ReLU's
// mask is computed anew from x: that reads one tensor less.
template <typename T, int V, bool kRelu, bool kShortcut>
void gradient_sums(const T* __restrict dy, const T* __restrict x, const T* __restrict y,
                   T* __restrict dshortcut, Piece r, const float* mean, const float* scale,
                   const float* shift, float* sum, float* dot) {
  Floats s[V] = {}, q[V] = {}, m[V], a[V], b[V];
  FOR_VECTORS {
    m[v] = load(mean + v * kLanes);
    a[v] = load(scale + v * kLanes);
    b[v] = load(shift + v * kLanes);
  }
  for (int64_t i = r.begin; i < r.end; ++i)
    FOR_VECTORS {
      const int64_t at = (i * V + v) * kLanes;
      const Floats xs = load(x + at);
      Floats g = load(dy + at);
      if (kRelu) g = (kShortcut ? load(y + at) : xs * a[v] + b[v]) <= 0 ? Floats{} : g;
      if (kShortcut) store(dshortcut + at, g);
      s[v] += g;
      q[v] += g * (xs - m[v]);
    }
  FOR_VECTORS {
    store(sum + v * kLanes, s[v]);
    store(dot + v * kLanes, q[v]);
  }
}

// dx = of_g g + of_x x + constant.
template <typename T, int V, bool kRelu>
void input_gradient(const T* __restrict dy, const T* __restrict x, T* __restrict dx, Piece r,
                    const float* of_g, const float* of_x, const float* constant,
                    const float* scale, const float* shift) {
  Floats cg[V], cx[V], c0[V], a[V], b[V];
  FOR_VECTORS {
    cg[v] = load(of_g + v * kLanes);
    cx[v] = load(of_x + v * kLanes);
    c0[v] = load(constant + v * kLanes);
    a[v] = load(scale + v * kLanes);
    b[v] = load(shift + v * kLanes);
  }
  for (int64_t i = r.begin; i < r.end; ++i)
    FOR_VECTORS {
      const int64_t at = (i * V + v) * kLanes;
      const Floats xs = load(x + at);
      Floats g = load(dy + at);
      if (kRelu) g = xs * a[v] + b[v] <= 0 ? Floats{} : g;
      store(dx + at, g * cg[v] + xs * cx[v] + c0[v]);
    }
}

template <int W>
void add_pieces(const float (*values)[W], double* total) {
  for (int p = 0; p < kPieces; ++p)
    for (int w = 0; w < W; ++w) total[w] += values[p][w];
}

template <typename T, int C, bool kRelu, bool kShortcut>
void forward(const T* x, const T* shortcut, T* y, int64_t rows, const float* gamma,
             const float* beta, float* running_mean, float* running_var, float* mean, float* rstd,
             float momentum, float eps, int threads) {
  constexpr int W = Wide<C>::W, V = Wide<C>::V;
  const int64_t wide_rows = rows * C / W;
  float sum[kPieces][W], square[kPieces][W], pivot[W], scale[W], shift[W];
  for (int w = 0; w < W; ++w) pivot[w] = scalar(x[w % C]);
  FOR_PIECES moments<T, V>(x, piece(wide_rows, p), pivot, sum[p], square[p]);
  double sums[W] = {}, squares[W] = {};
  add_pieces<W>(sum, sums);
  add_pieces<W>(square, squares);
  for (int c = 0; c < C; ++c) {
    double s = 0, q = 0;
    for (int w = c; w < W; w += C) s += sums[w], q += squares[w];
    const double n = double(rows), m2 = q - s * s / n;
    mean[c] = float(pivot[c] + s / n);
    rstd[c] = float(1 / std::sqrt(m2 / n + eps));
    for (int w = c; w < W; w += C) {
      scale[w] = gamma[c] * rstd[c];
      shift[w] = beta[c] - mean[c] * scale[w];
    }
    running_mean[c] += momentum * (mean[c] - running_mean[c]);
    running_var[c] += momentum * (float(m2 / (n - 1)) - running_var[c]);
  }
  FOR_PIECES apply<T, V, kRelu, kShortcut>(x, shortcut, y, piece(wide_rows, p), scale, shift);
}

template <typename T, int C, bool kRelu, bool kShortcut>
void backward(const T* dy, const T* x, const T* y, T* dx, T* dshortcut, int64_t rows,
              const float* gamma, const float* beta, const float* mean, const float* rstd,
              float* dgamma, float* dbeta, int threads) {
  constexpr int W = Wide<C>::W, V = Wide<C>::V;
  const int64_t wide_rows = rows * C / W;
  float sum[kPieces][W], dot[kPieces][W], centre[W], scale[W], shift[W];
  float of_g[W], of_x[W], constant[W];
  for (int w = 0; w < W; ++w) {
    const int c = w % C;
    centre[w] = mean[c];
    scale[w] = gamma[c] * rstd[c];
    shift[w] = beta[c] - mean[c] * scale[w];
  }
  FOR_PIECES gradient_sums<T, V, kRelu, kShortcut>(dy, x, y, dshortcut, piece(wide_rows, p), centre,
                                                   scale, shift, sum[p], dot[p]);
  double sums[W] = {}, dots[W] = {};
  add_pieces<W>(sum, sums);
  add_pieces<W>(dot, dots);
  for (int c = 0; c < C; ++c) {
    double s = 0, q = 0;
    for (int w = c; w < W; w += C) s += sums[w], q += dots[w];
    const double r = rstd[c], n = double(rows), a = gamma[c] * r, b = -a * r * r * q / n;
    dbeta[c] = float(s);
    dgamma[c] = float(q * r);
    for (int w = c; w < W; w += C) {
      of_g[w] = float(a);
      of_x[w] = float(b);
      constant[w] = float(-a * s / n - b * mean[c]);
    }
  }
  FOR_PIECES {
    const Piece r = piece(wide_rows, p);
    if (kShortcut)  // its gradient is g already
      input_gradient<T, V, false>(dshortcut, x, dx, r, of_g, of_x, constant, scale, shift);
    else
      input_gradient<T, V, kRelu>(dy, x, dx, r, of_g, of_x, constant, scale, shift);
  }
}

}  // namespace

// forward_<type>_<C>, backward_<type>_<C>: of replicas of `rows` rows, one's after the other's, each
// with its own statistics. `batch` is (replicas, 2, C): mean and 1 / deviation; `dparameters` alike:
// the gradients of gamma and beta. Of several replicas each moves running statistics of its own,
// which begin 2 C values apart.
// shortcut and dshortcut may be null; with a shortcut there is always a ReLU.
#define ENTRY(T, C)                                                                               \
  extern "C" void forward_##T##_##C(                                                              \
      const T* x, const T* shortcut, T* y, int64_t replicas, int64_t rows, const float* gamma,    \
      const float* beta, float* running_mean, float* running_var, float* batch, float momentum,   \
      float eps, int relu, int threads) {                                                         \
    auto run = shortcut ? forward<T, C, true, true>                                               \
               : relu   ? forward<T, C, true, false>                                              \
                        : forward<T, C, false, false>;                                            \
    for (int64_t r = 0; r < replicas; ++r) {                                                      \
      const int64_t at = r * rows * C, own = r * 2 * C;                                           \
      run(x + at, shortcut ? shortcut + at : nullptr, y + at, rows, gamma, beta,                  \
          running_mean + own, running_var + own, batch + own, batch + own + C, momentum, eps,     \
          threads);                                                                               \
    }                                                                                             \
  }                                                                                               \
  extern "C" void backward_##T##_##C(                                                             \
      const T* dy, const T* x, const T* y, T* dx, T* dshortcut, int64_t replicas, int64_t rows,   \
      const float* gamma, const float* beta, const float* batch, float* dparameters, int relu,    \
      int threads) {                                                                              \
    auto run = dshortcut ? backward<T, C, true, true>                                             \
               : relu    ? backward<T, C, true, false>                                            \
                         : backward<T, C, false, false>;                                          \
    for (int64_t r = 0; r < replicas; ++r) {                                                      \
      const int64_t at = r * rows * C, own = r * 2 * C;                                           \
      run(dy + at, x + at, y ? y + at : nullptr, dx + at, dshortcut ? dshortcut + at : nullptr,   \
          rows, gamma, beta, batch + own, batch + own + C, dparameters + own,                     \
          dparameters + own + C, threads);                                                        \
    }                                                                                             \
  }
#define ENTRIES(C) ENTRY(float, C) ENTRY(bfloat, C)

ENTRIES(16)
ENTRIES(32)
ENTRIES(64)
ENTRIES(128)
ENTRIES(256)
