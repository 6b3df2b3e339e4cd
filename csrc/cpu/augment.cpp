// Augmentation: y = (crop(resize(pixels)) - mean) * scale, of bytes, some crops mirrored.
// Memory: reads the crops once and writes them once; where pictures are resized, the rows that a new one is made of are
// read for each of them, out of the cache. A unit is a row of a crop.
#include "../augment.h"

#include <algorithm>

#include "dispatch.h"
#include "kernel.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

template <typename A>
FASTCNN_INLINE Vec<A> load_pixels(const uint8_t* p) {
  return load_bytes<A>(p);
}
template <typename A>
FASTCNN_INLINE Vec<A> load_pixels(const A* p) {
  return load(p);
}

// Where the elements of a vector's worth of pixels, which are three vectors, come from and what they are.
template <typename A, bool channels_last, bool mirrored>
struct Order {
  static constexpr int n = kLanes<A>;
  static constexpr int channel(int i) { return channels_last ? i % 3 : i / n; }
  static constexpr int source(int i) {
    const int pixel = channels_last ? i / 3 : i % n;
    return 3 * (mirrored ? n - 1 - pixel : pixel) + channel(i);
  }
  // As two shuffles: of the first two vectors, and of what that gives and the third.
  static constexpr int of_two(int i) { return source(i) < 2 * n ? source(i) : 0; }
  static constexpr int with_third(int i) { return source(i) < 2 * n ? i % n : source(i) - n; }
};

// The part-th vector of the three, in order.
template <typename Order, int part, typename V>
FASTCNN_INLINE V ordered(const V (&v)[3]) {
#if FASTCNN_SHUFFLE
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    const V two = __builtin_shufflevector(v[0], v[1], Order::of_two(part * Order::n + i)...);
    return __builtin_shufflevector(two, v[2], Order::with_third(part * Order::n + i)...);
  }(std::make_integer_sequence<int, Order::n>{});
#else
  V result;
  for (int i = 0; i < Order::n; ++i) {
    const int source = Order::source(part * Order::n + i);
    result[i] = v[source / Order::n][source % Order::n];
  }
  return result;
#endif
}

// Of a row that is resized: for each new pixel the first of the old ones that make it, and their weights.
template <typename A>
struct ResizedColumns {
  int64_t taps, begin, end;  // the most that make one; which of the row are needed at all
  int64_t* first;            // counted from `begin`
  A* weights;                // `taps` for each

  void prepare(const ResizedAxis<int64_t>& axis, int64_t offset, int64_t count) {
    taps = axis.taps(), begin = axis.first(offset), end = begin;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t from = axis.first(offset + j);
      first[j] = from - begin;
      end = std::max(end, weigh(axis, offset + j, from, weights + j * taps));
    }
  }
  // Those of one new pixel. Returns where its pixels end.
  static int64_t weigh(const ResizedAxis<int64_t>& axis, int64_t o, int64_t from, A* weights) {
    const int64_t taps = axis.taps();
    int64_t total = 0, end = from;
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t weight = from + k < axis.length ? axis.weight(o, from + k) : 0;
      weights[k] = static_cast<A>(weight), total += weight;
      if (weight > 0) end = from + k + 1;
    }
    for (int64_t k = 0; k < taps; ++k) weights[k] /= static_cast<A>(total);
    return end;
  }
};

template <typename T>
class Rows {
 public:
  using A = Compute<T>;
  static constexpr int64_t n = kLanes<A>;

  Rows(const AugmentTask& t, Scratch& scratch)
      : task_(t), mean_(scratch.take<A>(3 * n)), scale_(scratch.take<A>(3 * n)) {
    if (!task_.sizes) return;
    columns_.first = scratch.take<int64_t>(task_.crop_w);
    columns_.weights = scratch.take<A>(task_.crop_w * task_.taps[1]), row_weights_ = scratch.take<A>(task_.taps[0]);
    // A pixel is loaded and stored as four elements, so both have room for one more.
    sums_ = scratch.take<A>(3 * task_.W + 1), line_ = scratch.take<A>(3 * task_.crop_w + 1);
  }

  void unit(int64_t u) {
    const int64_t image = u / task_.crop_h, row = u % task_.crop_h;
    if (image != image_) prepare(image);
    T* const to = static_cast<T*>(task_.out) + image * 3 * task_.crop_h * task_.crop_w +
                  row * task_.crop_w * (task_.channels_last ? 3 : 1);
    const int64_t *offset = task_.offsets + 2 * image, o = offset[0] + row;
    const uint8_t* const picture = task_.x + image * 3 * task_.H * task_.W;
    if (task_.sizes) write(resized(picture, o), to);
    else write(picture + 3 * (o * task_.W + offset[1]), to);
  }

 private:
  ResizedAxis<int64_t> rows(int64_t image) const { return {task_.H, task_.sizes[2 * image]}; }
  ResizedAxis<int64_t> columns(int64_t image) const { return {task_.W, task_.sizes[2 * image + 1]}; }

  // What the rows of an image have in common.
  void prepare(int64_t image) {
    image_ = image;
    for (int i = 0; i < 3 * n; ++i) {
      const int64_t channel = task_.channels_last ? i % 3 : i / n;
      mean_[i] = static_cast<const A*>(task_.mean)[3 * image + channel];
      scale_[i] = static_cast<A>(task_.scale[channel]);
    }
    if (task_.sizes) columns_.prepare(columns(image), task_.offsets[2 * image + 1], task_.crop_w);
  }

  // A row of the crop of the resized picture.
  const A* resized(const uint8_t* picture, int64_t o) const {
    const ResizedAxis<int64_t> axis = rows(image_);
    const int64_t first = axis.first(o), last = ResizedColumns<A>::weigh(axis, o, first, row_weights_);
    const int64_t stride = 3 * task_.W, length = 3 * (columns_.end - columns_.begin);
    const uint8_t* const from = picture + first * stride + 3 * columns_.begin;
    const auto sum = [&](int64_t i, auto load) FASTCNN_INLINE_LAMBDA {
      auto total = row_weights_[0] * load(from + i);
      for (int64_t k = 1; k < last - first; ++k) total += row_weights_[k] * load(from + k * stride + i);
      return total;
    };
    for (int64_t i = 0; i < length; i += n) {
      if (length < n) {
        for (; i < length; ++i) sums_[i] = sum(i, [](const uint8_t* p) { return static_cast<A>(*p); });
      } else {
        const int64_t at = std::min(i, length - n);
        store(sums_ + at, sum(at, [](const uint8_t* p) FASTCNN_INLINE_LAMBDA { return load_pixels<A>(p); }));
      }
    }
    using Pixel = typename VectorOf<A, 4>::type;  // and an element of the next
    for (int64_t j = 0; j < task_.crop_w; ++j) {
      const A *weights = columns_.weights + j * columns_.taps, *pixels = sums_ + 3 * columns_.first[j];
      const int64_t taps = std::min(columns_.taps, length / 3 - columns_.first[j]);
      Pixel total = weights[0] * load_as<Pixel>(pixels);
      for (int64_t k = 1; k < taps; ++k) total += weights[k] * load_as<Pixel>(pixels + 3 * k);
      std::memcpy(line_ + 3 * j, &total, sizeof total);
    }
    return line_;
  }

  template <typename S>
  void write(const S* from, T* to) const {
    const bool mirrored = task_.mirror[image_];
    if (task_.channels_last) mirrored ? write<true, true>(from, to) : write<true, false>(from, to);
    else mirrored ? write<false, true>(from, to) : write<false, false>(from, to);
  }

  // The crop's row: pixels minus mean, times scale.
  template <bool channels_last, bool mirrored, typename S>
  void write(const S* from, T* to) const {
    const int64_t width = task_.crop_w, plane = task_.crop_h * width;
    if (width >= n) {
      for (int64_t i = 0; i < width; i += n) {  // the last vector overlaps the one before
        const int64_t at = std::min(i, width - n);
        const S* const pixels = from + 3 * (mirrored ? width - n - at : at);
        write_pixels<channels_last, mirrored>(pixels, channels_last ? to + 3 * at : to + at, channels_last ? n : plane);
      }
      return;
    }
    S padded[3 * n] = {};
    T written[3 * n];
    std::copy(from, from + 3 * width, padded + (mirrored ? 3 * (n - width) : 0));
    write_pixels<channels_last, mirrored>(padded, written, n);
    if (channels_last) std::memcpy(to, written, 3 * width * sizeof(T));
    else
      for (int c = 0; c < 3; ++c) std::memcpy(to + c * plane, written + c * n, width * sizeof(T));
  }

  // A vector's worth of pixels, as three vectors that are `stride` apart.
  template <bool channels_last, bool mirrored, typename S>
  FASTCNN_INLINE void write_pixels(const S* from, T* to, int64_t stride) const {
    const Vec<A> v[3] = {load_pixels<A>(from), load_pixels<A>(from + n), load_pixels<A>(from + 2 * n)};
    const auto write = [&]<int i>(std::integral_constant<int, i>) FASTCNN_INLINE_LAMBDA {
      const Vec<A> pixels = ordered<Order<A, channels_last, mirrored>, i>(v);
      store(to + i * stride, (pixels - load(mean_ + i * n)) * load(scale_ + i * n));
    };
    write(std::integral_constant<int, 0>());
    write(std::integral_constant<int, 1>());
    write(std::integral_constant<int, 2>());
  }

  const AugmentTask& task_;
  A *const mean_, *const scale_;  // of each element of a vector's worth of pixels
  int64_t image_ = -1;            // the one that all of these are prepared for
  ResizedColumns<A> columns_{};
  A *row_weights_ = nullptr, *sums_ = nullptr, *line_ = nullptr;
};

int64_t units(const AugmentTask& task) { return task.N * task.crop_h; }

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(augment, AugmentTask, units, scratch_bytes<Rows>, run<Rows>)
