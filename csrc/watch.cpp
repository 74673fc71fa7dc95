#include "watch.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace fastsam {
namespace {

using torch::stable::Tensor;

// A tensor, asked by torch's handle, which answers several times as fast as the Python object does. The device is not
// asked for: as long as the tensor's memory is held, no other memory has its address.
struct Look {
  int64_t address = 0, kind = -1, dim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;

  explicit Look(const Tensor& tensor) {
    void* start = nullptr;
    int32_t dtype = 0;
    if (aoti_torch_get_data_ptr(tensor.get(), &start) == AOTI_TORCH_SUCCESS &&
        aoti_torch_get_sizes(tensor.get(), &sizes) == AOTI_TORCH_SUCCESS &&
        aoti_torch_get_strides(tensor.get(), &strides) == AOTI_TORCH_SUCCESS &&
        aoti_torch_get_dim(tensor.get(), &dim) == AOTI_TORCH_SUCCESS &&
        aoti_torch_get_dtype(tensor.get(), &dtype) == AOTI_TORCH_SUCCESS) {
      address = static_cast<int64_t>(reinterpret_cast<intptr_t>(start));
      kind = int64_t{dtype} << 32 | dim;
    }
  }
};

class Watch {
 public:
  explicit Watch(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const Tensor& tensor : tensors_) {
      const Look look(tensor);
      STD_TORCH_CHECK(look.kind >= 0, "fastsam: a tensor that is to be watched has no address");
      expected_.insert(expected_.end(), {look.address, look.kind});
      expected_.insert(expected_.end(), look.sizes, look.sizes + look.dim);
      expected_.insert(expected_.end(), look.strides, look.strides + look.dim);
    }
  }

  bool is_unchanged() const {
    const int64_t* expected = expected_.data();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      prefetch(i + 12, i + 6);
      const Look look(tensors_[i]);
      if (look.address != expected[0] || look.kind != expected[1]) return false;
      expected += 2;
      if (!std::equal(look.sizes, look.sizes + look.dim, expected) ||
          !std::equal(look.strides, look.strides + look.dim, expected + look.dim)) {
        return false;
      }
      expected += 2 * look.dim;
    }
    return true;
  }

 private:
  // Prefetches a handle, and the tensor object behind an earlier one: comparing thousands of small tensors is bound by
  // cache misses. This assumes that a handle's first word is the object's address; if it were not, the prefetch would
  // be useless but harmless.
  void prefetch(size_t handle, size_t object) const {
    if (handle < tensors_.size()) __builtin_prefetch(tensors_[handle].get());
    if (object >= tensors_.size()) return;
    const char* start = *reinterpret_cast<const char* const*>(tensors_[object].get());
    for (int line = 0; line < 4; ++line) __builtin_prefetch(start + 64 * line);
  }

  std::vector<Tensor> tensors_;
  std::vector<int64_t> expected_;
};

// By number rather than by address: a wrong number does no harm. Never destroyed: tensors cannot be released when
// Python is gone.
struct Watches {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<const Watch>> of;
  int64_t last = 0;
};

Watches& watches() {
  static auto* all = new Watches;
  return *all;
}

std::shared_ptr<const Watch> find(int64_t number) {
  Watches& all = watches();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto entry = all.of.find(number);
  return entry == all.of.end() ? nullptr : entry->second;
}

}  // namespace

int64_t watch(std::vector<Tensor> tensors) {
  auto made = std::make_shared<Watch>(std::move(tensors));
  Watches& all = watches();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.of.emplace(++all.last, std::move(made));
  return all.last;
}

bool is_unchanged(int64_t number) {
  const auto watch = find(number);
  return watch != nullptr && watch->is_unchanged();
}

void unwatch(int64_t number) {
  // Destroyed after the lock: to release a tensor may take Python's lock.
  const auto watch = find(number);
  Watches& all = watches();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.of.erase(number);
}

}  // namespace fastsam
