// SPDX-License-Identifier: BSD-3-Clause
//
// Runs the passes of training.h over a batch: tiles, threads, their scratch, and the order in which sums are merged.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels/training.h"
#include "run.h"

namespace fusedsep {

// A batch in tiles that do not depend on the number of threads, so that neither do the sums over them.
template <typename T>
class TrainingTiles {
 public:
  TrainingTiles(const TrainingKernels<T>& kernels, const SeparableParams<T>& conv)
      : lanes_(kernels.lanes), channels_last_(conv.channels_last), pixels_(conv.out_height * conv.out_width) {
    // Pixels are rows of the products in channels_last, columns in NCHW: whole vectors, or whole register tiles.
    const int64_t unit = channels_last_ ? lanes_ : kernels.tile_columns;
    // In channels_last the batch is one run of pixels.
    runs_ = channels_last_ ? 1 : conv.batch;
    if (channels_last_) pixels_ *= conv.batch;
    // h and gp of a tile stay in L2 (256 KiB on the smallest processors), but there are enough pixels to read the
    // weights, which do not, at a profit.
    constexpr int64_t kTileBytes = 128 * 1024;
    const int64_t fitting = kTileBytes / ((conv.in_channels + conv.out_channels) * int64_t(sizeof(T)));
    const int64_t most = std::min(kMaxTilePixels, std::max(fitting, 4 * kernels.tile_rows) + unit - 1) / unit * unit;
    // The few pixels of the smallest maps are shared out as well.
    constexpr int64_t kLeastPixels = 16;
    const int64_t least = runs_ == 1 && pixels_ >= 2 * kLeastPixels ? 2 : 1;
    tiles_per_run_ = std::max<int64_t>(least, (pixels_ + most - 1) / most);
    const int64_t even = (pixels_ + tiles_per_run_ - 1) / tiles_per_run_;
    size_ = (even + unit - 1) / unit * unit;
    tiles_per_run_ = pixels_ == 0 ? 0 : (pixels_ + size_ - 1) / size_;
  }

  int64_t count() const { return runs_ * tiles_per_run_; }
  int64_t most_pixels() const { return size_; }
  Tile operator[](int64_t i) const {
    const int64_t begin = i % tiles_per_run_ * size_;
    return {i / tiles_per_run_, begin, std::min(begin + size_, pixels_)};
  }
  // Of a tile; `padded` to whole vectors.
  int64_t pixels(int64_t i) const {
    const Tile tile = (*this)[i];
    return tile.end - tile.begin;
  }
  int64_t padded_pixels(int64_t i) const { return (pixels(i) + lanes_ - 1) / lanes_ * lanes_; }

 private:
  int64_t lanes_;
  bool channels_last_;
  int64_t pixels_, runs_, tiles_per_run_, size_;
};

// Output rows of a batch, counted on from image to image, in parts that do not depend on the number of threads either.
class RowParts {
 public:
  // For `lines` jobs a part, each of which works on `line_bytes` of a pixel.
  template <typename T>
  RowParts(const SeparableParams<T>& conv, int64_t lines, int64_t line_bytes) : out_width_(conv.out_width) {
    // What a job has made is in L2 when the statistics are taken of it.
    constexpr int64_t kPartBytes = 128 * 1024, kJobs = 16;
    const int64_t fitting = std::max<int64_t>(1, kPartBytes / (conv.out_width * line_bytes));
    // Whole images read no row twice.
    rows_ = fitting >= conv.out_height ? conv.out_height : 1;
    units_ = conv.batch * conv.out_height / rows_;
    count_ = std::min(units_, std::max((units_ * rows_ + fitting - 1) / fitting, (kJobs + lines - 1) / lines));
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t i) const { return i * units_ / count_ * rows_; }
  int64_t pixels(int64_t i) const { return (begin(i + 1) - begin(i)) * out_width_; }

 private:
  int64_t out_width_, rows_, units_, count_;
};

// Two sums a channel and tile: [tile][2][padded channels].
using TileSums = std::vector<double>;

// Mean and biased variance of each channel over all parts, which are tiles or rows (T. Chan, G. Golub, R. LeVeque,
// 1983, for more than two of them).
template <class Parts>
void merge_statistics(const Parts& parts, const TileSums& sums, int64_t padded, double* mean, double* variance) {
  double count = 0;
  std::fill(mean, mean + padded, 0.0);
  std::fill(variance, variance + padded, 0.0);
  for (int64_t i = 0; i < parts.count(); ++i) {
    const double pixels = double(parts.pixels(i));
    const double* tile_mean = sums.data() + 2 * i * padded;
    count += pixels;
    for (int64_t c = 0; c < padded; ++c) mean[c] += pixels * tile_mean[c];
  }
  if (count == 0) return;
  for (int64_t c = 0; c < padded; ++c) mean[c] /= count;
  for (int64_t i = 0; i < parts.count(); ++i) {
    const double pixels = double(parts.pixels(i));
    const double *tile_mean = sums.data() + 2 * i * padded, *squares = tile_mean + padded;
    for (int64_t c = 0; c < padded; ++c) {
      const double apart = tile_mean[c] - mean[c];
      variance[c] += squares[c] + pixels * apart * apart;
    }
  }
  for (int64_t c = 0; c < padded; ++c) variance[c] /= count;
}

// The two sums of each channel over all tiles.
template <typename T>
void merge_sums(const TrainingTiles<T>& tiles, const TileSums& sums, int64_t padded, double* first, double* second) {
  std::fill(first, first + padded, 0.0);
  std::fill(second, second + padded, 0.0);
  for (int64_t i = 0; i < tiles.count(); ++i) {
    const double* tile = sums.data() + 2 * i * padded;
    for (int64_t c = 0; c < padded; ++c) first[c] += tile[c];
    for (int64_t c = 0; c < padded; ++c) second[c] += tile[padded + c];
  }
}

// The passes over one batch. `parallel_for` is that of run.h.
template <typename T, class ParallelFor>
class TrainingRun {
 public:
  TrainingRun(const TrainingKernels<T>& kernels, const TrainingParams<T>& params, int64_t threads,
              const ParallelFor& parallel_for)
      : params(params),
        kernels_(kernels),
        tiles_(kernels, params.conv),
        threads_(threads),
        parallel_for_(parallel_for) {}

  TrainingParams<T> params;

  // Packs the weights of params.conv: for the forward passes, or `transposed` for the backward ones.
  void pack(const T* depthwise_weight, const T* pointwise_weight, bool transposed) {
    static thread_local Workspace workspace;
    const SeparableParams<T>& conv = params.conv;
    const int64_t size = kernels_.packed_size(conv.in_channels, conv.out_channels, conv.channels_last, transposed);
    T* packed = static_cast<T*>(workspace.get(size_t(size) * sizeof(T)));
    const int64_t results = transposed ? conv.in_channels : conv.out_channels, step = kernels_.tile_columns;
    parallel_for_((results + step - 1) / step, [&](int64_t begin, int64_t end) {
      kernels_.pack(depthwise_weight, pointwise_weight, conv.in_channels, conv.out_channels, conv.channels_last,
                    transposed, begin * step, std::min(end * step, results), packed);
    });
    params.conv.packed = packed;
  }

  // Mean and biased variance of d; arrays of padded channels.
  void depthwise_statistics(double* mean, double* variance) {
    const int64_t padded = padded_channels(params.conv.in_channels);
    TileSums sums(size_t(2 * padded * tiles_.count()));
    for_each_tile([&](int64_t i, T* scratch) {
      kernels_.depthwise_statistics(params, tiles_[i], scratch, sums.data() + 2 * i * padded);
    });
    merge_statistics(tiles_, sums, padded, mean, variance);
  }

  // p, and its mean and biased variance unless `mean` is null.
  void forward(double* mean, double* variance) {
    const int64_t padded = padded_channels(params.conv.out_channels);
    TileSums sums(mean == nullptr ? 0 : size_t(2 * padded * tiles_.count()));
    for_each_tile([&](int64_t i, T* scratch) {
      kernels_.forward(params, tiles_[i], scratch, mean == nullptr ? nullptr : sums.data() + 2 * i * padded);
    });
    if (mean != nullptr) merge_statistics(tiles_, sums, padded, mean, variance);
  }

  // The taps of a depthwise convolution by itself, `reversed` for its backward.
  void pack_taps(const T* weight, bool reversed) {
    static thread_local Workspace workspace;
    const SeparableParams<T>& conv = params.conv;
    const int64_t size = kernels_.depthwise_map_packed_size(conv.in_channels, conv.kernel);
    T* packed = static_cast<T*>(workspace.get(size_t(size) * sizeof(T)));
    kernels_.pack_taps(weight, conv.in_channels, conv.kernel, reversed, packed);
    params.conv.packed = packed;
  }

  // p of a depthwise convolution by itself, and its mean and biased variance unless `mean` is null.
  void depthwise_map_forward(double* mean, double* variance) {
    const int64_t channels = params.conv.in_channels, padded = padded_channels(channels);
    const int64_t step = kernels_.line_channels, lines = (channels + step - 1) / step;
    const RowParts parts(params.conv, lines, step * int64_t(sizeof(T)));
    TileSums sums(mean == nullptr ? 0 : size_t(2 * padded * parts.count()));
    for_each_job(parts.count() * lines, kernels_.depthwise_map_scratch_size(params), [&](int64_t job, T* scratch) {
      const int64_t part = job / lines, begin = job % lines * step;
      kernels_.depthwise_map_forward(params, parts.begin(part), parts.begin(part + 1), begin,
                                     std::min(begin + step, channels), scratch,
                                     mean == nullptr ? nullptr : sums.data() + 2 * part * padded);
    });
    if (mean != nullptr) merge_statistics(parts, sums, padded, mean, variance);
  }

  void normalize() {
    for_each_tile([&](int64_t i, T*) { kernels_.normalize(params, tiles_[i]); });
  }

  // S1 and S2.
  void normalize_backward_reduce(double* sum, double* moment) {
    const int64_t padded = padded_channels(params.conv.out_channels);
    TileSums sums(size_t(2 * padded * tiles_.count()));
    for_each_tile(
        [&](int64_t i, T*) { kernels_.normalize_backward_reduce(params, tiles_[i], sums.data() + 2 * i * padded); });
    merge_sums(tiles_, sums, padded, sum, moment);
  }

  // g1, T1 and T2 unless `sum` is null; the weight gradient unless `grad_weight` is null.
  void pointwise_backward(double* sum, double* moment, T* grad_weight) {
    const int64_t padded = padded_channels(params.conv.in_channels), tiles = tiles_.count();
    TileSums sums(sum == nullptr ? 0 : size_t(2 * padded * tiles));
    double* const tile_sums = sum == nullptr ? nullptr : sums.data();
    const int64_t weights = params.conv.in_channels * params.conv.out_channels;
    if (grad_weight == nullptr) {
      for_each_tile([&](int64_t i, T* scratch) { pointwise_backward_tile(i, scratch, tile_sums, nullptr, 0); });
    } else if (tiles == 0) {
      std::fill(grad_weight, grad_weight + weights, T(0));
    } else if (weights <= kPartWeights) {
      weight_gradient_in_parts(tile_sums, grad_weight);
    } else {
      weight_gradient_in_turn(tile_sums, grad_weight);
    }
    if (sum != nullptr) merge_sums(tiles_, sums, padded, sum, moment);
  }

  // The weight gradient [out_channels][in_channels] of a convolution whose rows are patches.
  void convolution_backward(T* grad_weight) {
    const SeparableParams<T>& conv = params.conv;
    const int64_t tiles = tiles_.count(), padded = padded_channels(conv.out_channels), size = conv.in_channels * padded;
    // Parts of the tiles side by side, of which each thread takes some: their number depends on sizes alone.
    constexpr int64_t kMostSums = 256 * 1024;
    const int64_t parts = std::min({kParts, std::max<int64_t>(1, kMostSums / size), tiles});
    std::vector<double> sums(size_t(std::max<int64_t>(1, parts) * size));
    const int64_t scratch_size =
        kernels_.convolution_scratch_size(conv.in_channels, conv.out_channels, tiles_.most_pixels());
    for_each_job(parts, scratch_size, [&](int64_t part, T* scratch) {
      for (int64_t i = part * tiles / parts; i < (part + 1) * tiles / parts; ++i) {
        kernels_.convolution_backward(params, tiles_[i], scratch, sums.data() + part * size);
      }
    });
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = 0; i < size; ++i) sums[size_t(i)] += sums[size_t(part * size + i)];
    }
    for (int64_t o = 0; o < conv.out_channels; ++o) {
      for (int64_t k = 0; k < conv.in_channels; ++k) {
        grad_weight[o * conv.in_channels + k] = T(sums[size_t(k * padded + o)]);
      }
    }
  }

  // grad_x where params has it; the weight gradient [in_channels][taps] unless it is null.
  void depthwise_backward(T* grad_weight) {
    const SeparableParams<T>& conv = params.conv;
    const int64_t channels = conv.in_channels, padded = padded_channels(channels);
    const int64_t step = kernels_.depthwise_backward_channels(conv.channels_last);
    const int64_t groups = (channels + step - 1) / step;
    // Images in so many parts that there is enough to share out, whatever the number of threads.
    constexpr int64_t kJobs = 16;
    const int64_t parts = std::min(conv.batch, (kJobs + groups - 1) / groups), jobs = parts * groups;
    const int64_t taps = conv.kernel * conv.kernel, size = taps * padded;
    std::vector<double> sums(grad_weight == nullptr ? 0 : size_t(parts * size));
    for_each_job(jobs, kernels_.depthwise_backward_scratch_size(params), [&](int64_t job, T* scratch) {
      const int64_t part = job / groups, begin = job % groups * step;
      kernels_.depthwise_backward(params, part * conv.batch / parts, (part + 1) * conv.batch / parts, begin,
                                  std::min(begin + step, channels), scratch,
                                  grad_weight == nullptr ? nullptr : sums.data() + part * size);
    });
    if (grad_weight == nullptr) return;
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = 0; i < size; ++i) sums[size_t(i)] += sums[size_t(part * size + i)];
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        grad_weight[taps * c + t] = parts == 0 ? T(0) : T(sums[size_t(t * padded + c)]);
      }
    }
  }

 private:
  // At most so many tiles have their operands of the weight gradient formed side by side, before the product takes
  // them all.
  static constexpr int64_t kMaxGroup = 8;
  // As many as give the product this depth, so that loading and storing its result does not count.
  static constexpr int64_t kGroupPixels = 512;
  int64_t group() const {
    const int64_t pixels = std::max<int64_t>(1, tiles_.most_pixels());
    return std::min(kMaxGroup, (kGroupPixels + pixels - 1) / pixels);
  }
  // Weight gradients of so many elements are formed in parts, each on one thread from its own groups of tiles, without
  // waiting for others: kParts of them are 1 MiB at most.
  static constexpr int64_t kParts = 16, kPartWeights = 128 * 128;

  static int64_t rounded(int64_t elements) { return (elements + 15) / 16 * 16; }

  // g1 and the sums of tile `i`, and its operands of the weight gradient unless `gradient` is null.
  void pointwise_backward_tile(int64_t i, T* scratch, double* sums, const WeightGradient<T>* gradient, int64_t offset) {
    kernels_.pointwise_backward(params, tiles_[i], scratch,
                                sums == nullptr ? nullptr : sums + 2 * i * padded_channels(params.conv.in_channels),
                                gradient, offset);
  }

  // Where the operands of a group begin in `memory`; elements of both if that is null.
  int64_t place_operands(T* memory, WeightGradient<T>& gradient) const {
    int64_t rows, columns;
    kernels_.weight_gradient_sizes(params.conv.in_channels, params.conv.out_channels, group() * tiles_.most_pixels(),
                                   &rows, &columns);
    gradient.rows = memory;
    gradient.columns = memory == nullptr ? nullptr : memory + rounded(rows);
    return rounded(rows) + rounded(columns);
  }

  // Groups of tiles in order; threads share the tiles of a group, then the rows of the product.
  void weight_gradient_in_turn(double* sums, T* grad_weight) {
    static thread_local Workspace workspace;
    WeightGradient<T> gradient{nullptr, nullptr, 0, grad_weight, false};
    place_operands(static_cast<T*>(workspace.get(size_t(place_operands(nullptr, gradient)) * sizeof(T))), gradient);
    const int64_t blocks = kernels_.weight_gradient_blocks(params.conv.out_channels);
    for (int64_t begin = 0; begin < tiles_.count(); begin += group()) {
      const int64_t end = std::min(begin + group(), tiles_.count());
      int64_t offset[kMaxGroup];
      gradient.depth = 0;
      for (int64_t i = begin; i < end; ++i) {
        offset[i - begin] = gradient.depth;
        gradient.depth += tiles_.padded_pixels(i);
      }
      for_each(begin, end,
               [&](int64_t i, T* scratch) { pointwise_backward_tile(i, scratch, sums, &gradient, offset[i - begin]); });
      parallel_for_(blocks,
                    [&](int64_t first, int64_t last) { kernels_.weight_gradient(params, gradient, first, last); });
      gradient.accumulate = true;
    }
  }

  // Parts of the groups of tiles side by side, added up in order.
  void weight_gradient_in_parts(double* sums, T* grad_weight) {
    static thread_local Workspace workspace;
    const int64_t tiles = tiles_.count(), groups = (tiles + group() - 1) / group(), parts = std::min(kParts, groups);
    const int64_t weights = params.conv.in_channels * params.conv.out_channels, padded = rounded(weights);
    const int64_t blocks = kernels_.weight_gradient_blocks(params.conv.out_channels);
    const int64_t workers = std::min(parts, threads_);
    WeightGradient<T> sizes{};
    const int64_t operands = place_operands(nullptr, sizes), scratch_size = tile_scratch_size(0, tiles);
    T* const memory =
        static_cast<T*>(workspace.get(size_t(parts * padded + workers * (operands + scratch_size)) * sizeof(T)));
    parallel_for_(workers, [&](int64_t first, int64_t last) {
      for (int64_t worker = first; worker < last; ++worker) {
        T* const own = memory + parts * padded + worker * (operands + scratch_size);
        for (int64_t part = worker * parts / workers; part < (worker + 1) * parts / workers; ++part) {
          WeightGradient<T> gradient{nullptr, nullptr, 0, memory + part * padded, false};
          place_operands(own, gradient);
          for (int64_t g = part * groups / parts; g < (part + 1) * groups / parts; ++g) {
            const int64_t begin = g * group(), end = std::min(begin + group(), tiles);
            gradient.depth = 0;
            for (int64_t i = begin; i < end; ++i) gradient.depth += tiles_.padded_pixels(i);
            int64_t offset = 0;
            for (int64_t i = begin; i < end; ++i) {
              pointwise_backward_tile(i, own + operands, sums, &gradient, offset);
              offset += tiles_.padded_pixels(i);
            }
            kernels_.weight_gradient(params, gradient, 0, blocks);
            gradient.accumulate = true;
          }
        }
      }
    });
    for (int64_t i = 0; i < weights; ++i) {
      T total = memory[i];
      for (int64_t part = 1; part < parts; ++part) total += memory[part * padded + i];
      grad_weight[i] = total;
    }
  }

  template <class F>
  void for_each_tile(const F& f) {
    for_each(0, tiles_.count(), f);
  }

  // f(tile, scratch) for tiles [begin, end).
  template <class F>
  void for_each(int64_t begin, int64_t end, const F& f) {
    for_each_job(end - begin, tile_scratch_size(begin, end), [&](int64_t job, T* scratch) { f(begin + job, scratch); });
  }

  // f(job, scratch) for every job, each with `scratch_size` elements that are its thread's.
  template <class F>
  void for_each_job(int64_t jobs, int64_t scratch_size, const F& f) {
    static thread_local Workspace workspace;
    const int64_t workers = std::min(jobs, threads_), size = rounded(scratch_size);
    if (jobs == 0) return;
    T* const scratch = static_cast<T*>(workspace.get(size_t(workers * size) * sizeof(T)));
    parallel_for_(workers, [&](int64_t first, int64_t last) {
      for (int64_t worker = first; worker < last; ++worker) {
        for (int64_t job = worker * jobs / workers; job < (worker + 1) * jobs / workers; ++job) {
          f(job, scratch + worker * size);
        }
      }
    });
  }

  // Elements of scratch for any of tiles [begin, end).
  int64_t tile_scratch_size(int64_t begin, int64_t end) const {
    const SeparableParams<T>& conv = params.conv;
    int64_t input_pixels = 0;
    for (int64_t i = begin; i < end && params.x_affine.center != nullptr; ++i) {
      const PixelRange range = input_of_tile(conv, tiles_[i]);
      input_pixels = std::max(input_pixels, range.end - range.begin);
    }
    return rounded(kernels_.scratch_size(conv.in_channels, conv.out_channels, tiles_.most_pixels(), input_pixels,
                                         conv.channels_last));
  }

  const TrainingKernels<T>& kernels_;
  TrainingTiles<T> tiles_;
  int64_t threads_;
  const ParallelFor& parallel_for_;
};

}  // namespace fusedsep
