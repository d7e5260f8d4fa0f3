// The library as operators of PyTorch, through the C interface that PyTorch keeps stable (torch 2.10): what runs in
// every step of a model is called without Python. Nothing of PyTorch is linked: operators.py hands its functions over.
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "fewbits.h"

namespace {

fewbits_torch torch;
fewbits_parallel parallel;
constexpr uint64_t VERSION = uint64_t(2) << 56 | uint64_t(10) << 48;  // of PyTorch, whose conventions are kept here
constexpr int DIMENSIONS = 8;  // of an input, at most

void check(int error, const char *what) {
  if (error) throw std::runtime_error(std::string("PyTorch does not give ") + what);
}

enum { UINT8 = 0, INT8 = 1, FLOAT16 = 5, FLOAT32 = 6, BOOL = 11, BFLOAT16 = 15 };  // PyTorch's dtypes

int type_of(int32_t scalar_type) {
  switch (scalar_type) {
    case BFLOAT16: return FEWBITS_BF16;
    case FLOAT16: return FEWBITS_F16;
    case FLOAT32: return FEWBITS_F32;
    default: return -1;
  }
}

// A tensor that is released at the end.
class Tensor {
 public:
  explicit Tensor(void *handle) : handle_(handle) {}
  explicit Tensor(uint64_t value) : handle_(reinterpret_cast<void *>(value)) {}
  Tensor(const Tensor &) = delete;
  Tensor &operator=(const Tensor &) = delete;
  ~Tensor() {
    if (handle_) torch.release(handle_);
  }

  static void *empty(int64_t dim, const int64_t *sizes, int32_t scalar_type) {
    int64_t strides[DIMENSIONS + 1], all = 1;
    for (int64_t i = dim - 1; i >= 0; all *= sizes[i--]) strides[i] = all;
    void *made;
    check(torch.empty(dim, sizes, strides, scalar_type, 0, -1, &made), "memory");
    return made;
  }

  uint64_t give() {
    void *given = handle_;
    handle_ = nullptr;
    return reinterpret_cast<uint64_t>(given);
  }
  void replace(void *handle) {
    torch.release(handle_);
    handle_ = handle;
  }
  void *handle() const { return handle_; }
  void *data() const { return ask(torch.data, "data"); }
  int64_t dim() const { return ask(torch.dim, "dimensions"); }
  const int64_t *sizes() const { return ask(torch.sizes, "sizes"); }
  const int64_t *strides() const { return ask(torch.strides, "strides"); }
  int32_t scalar_type() const { return ask(torch.type, "a dtype"); }
  int64_t count() const {
    int64_t count = 1;
    for (int64_t i = 0, n = dim(); i < n; i++) count *= sizes()[i];
    return count;
  }
  // Whether it is so many numbers in one piece, or there are none, as there shall be.
  bool holds(int64_t expected, int32_t type) const {
    if (count() != expected) return false;
    int64_t apart = 1;
    for (int64_t i = dim() - 1; expected && i >= 0; apart *= sizes()[i--])
      if (sizes()[i] != 1 && strides()[i] != apart) return false;
    return !expected || scalar_type() == type;
  }
  // NULL of one without numbers, which stands for none.
  void *data_or_null() const { return count() ? data() : nullptr; }

 private:
  template <class T>
  T ask(int (*function)(void *, T *), const char *what) const {
    T value;
    check(function(handle_, &value), what);
    return value;
  }

  void *handle_;
};

int threads() {
  uint32_t count;
  check(torch.threads(&count), "threads");
  return int(count);
}

[[noreturn]] void refuse(const std::string &what) { throw std::runtime_error("fewbits: " + what); }

// x (..., in) as rows that are equally far apart; copied if they are not.
struct Rows {
  int64_t count = 1, stride = 0;
  int32_t scalar_type;
  int type;
  int64_t sizes[DIMENSIONS + 1];  // of x, and then of the result
  int64_t dim;

  Rows(Tensor &x, int64_t in, int64_t out) : scalar_type(x.scalar_type()), type(type_of(scalar_type)), dim(x.dim()) {
    if (type < 0) refuse("inputs are of bfloat16, float16 or float32");
    if (dim < 1 || dim > DIMENSIONS) refuse("inputs have 1 to 8 dimensions, not " + std::to_string(dim));
    std::memcpy(sizes, x.sizes(), dim * sizeof(int64_t));
    if (sizes[dim - 1] != in)
      refuse("x has " + std::to_string(sizes[dim - 1]) + " columns, W has " + std::to_string(in));
    for (int64_t i = 0; i < dim - 1; i++) count *= sizes[i];
    if (!regular(x.strides())) {
      Tensor copy(Tensor::empty(dim, sizes, scalar_type));
      check(torch.copy(copy.handle(), x.handle(), 0), "a copy");
      x.replace(reinterpret_cast<void *>(copy.give()));
      stride = in;
    }
    sizes[dim - 1] = out;
  }

 private:
  bool regular(const int64_t *strides) {
    if (sizes[dim - 1] > 1 && strides[dim - 1] != 1) return false;
    int64_t next = -1;  // the stride that another dimension has, if rows go on in it
    stride = sizes[dim - 1];
    for (int64_t i = dim - 2; i >= 0; i--) {
      if (sizes[i] == 1) continue;
      if (next < 0) stride = strides[i];
      if (next >= 0 && strides[i] != next) return false;
      next = strides[i] * sizes[i];
    }
    return true;
  }
};

void check_bias(const Tensor &bias, const Rows &rows, int64_t out) {
  if (!bias.count()) return;
  if (!bias.holds(out, rows.scalar_type))
    refuse("a bias has " + std::to_string(out) + " numbers in the dtype of x");
}

void done(int error, const char *what) {
  if (error == 2) throw std::bad_alloc();
  if (error) refuse(std::string("the library does not take ") + what);
}

void linear(uint64_t *stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), bias(stack[1]), codes(stack[2]), scales(stack[3]), zeros(stack[4]), table(stack[5]);
  const int64_t out = int64_t(stack[6]), in = int64_t(stack[7]), group = int64_t(stack[9]);
  const Rows rows(x, in, out);
  check_bias(bias, rows, out);
  if (out < 0 || group < 1 || group % 32) refuse("a group is of a multiple of 32 columns");
  const int64_t columns = (in + group - 1) / group * group, scaled = (out + 31) / 32 * (columns / group) * 32;
  const fewbits_weight weight = {
      out, in, columns, int32_t(stack[8]), int32_t(group), type_of(scales.scalar_type()), int32_t(stack[10]),
      static_cast<const uint8_t *>(codes.data()), scales.data(), zeros.data_or_null(), table.data_or_null()};
  const int kind = weight.zero_type;
  const bool points = kind == FEWBITS_ZERO_POINT, offsets = kind == FEWBITS_OFFSET, entries = kind == FEWBITS_TABLE;
  if (!codes.holds(fewbits_packed_bytes(out, columns, weight.bits), UINT8) ||
      !scales.holds(scaled, scales.scalar_type()) ||
      !zeros.holds(points || offsets ? scaled : 0, points ? INT8 : FLOAT32) ||
      !table.holds(entries ? 16 : kind == FEWBITS_TRELLIS ? 256 : 0, entries ? FLOAT32 : INT8))
    refuse("codes, scales, zeros or a table are not as the weight has them");
  Tensor y(Tensor::empty(rows.dim, rows.sizes, rows.scalar_type));
  done(fewbits_linear(&weight, x.data(), rows.count, rows.stride, rows.type, bias.data_or_null(), y.data(),
                      int(stack[11]), threads(), parallel),
       "this weight");
  stack[0] = y.give();
}

void float_linear(uint64_t *stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), weight(stack[1]), bias(stack[2]);
  if (weight.dim() != 2) refuse("a weight has two dimensions");
  const int64_t out = weight.sizes()[0], in = weight.sizes()[1];
  const Rows rows(x, in, out);
  check_bias(bias, rows, out);
  if (!weight.holds(out * in, rows.scalar_type))
    refuse("a weight lies in one piece, in the dtype of x");
  Tensor y(Tensor::empty(rows.dim, rows.sizes, rows.scalar_type));
  done(fewbits_float_linear(weight.data(), out, in, x.data(), rows.count, rows.stride, rows.type, bias.data_or_null(),
                            y.data(), threads(), parallel),
       "these floats");
  stack[0] = y.give();
}

void attend_few(uint64_t *stack, uint64_t, uint64_t) {
  Tensor query(stack[0]), key(stack[1]), value(stack[2]), mask(stack[3]);
  double scaling;
  std::memcpy(&scaling, &stack[4], sizeof scaling);
  for (const Tensor *t : {&query, &key, &value})
    if (t->dim() != 4 || t->strides()[3] != 1 || t->scalar_type() != query.scalar_type())
      refuse("queries, keys and values have four dimensions, the last in one piece, and one dtype");
  const int64_t *q = query.sizes(), *k = key.sizes(), *v = value.sizes();
  if (k[0] != q[0] || v[0] != q[0] || v[1] != k[1] || v[2] != k[2] || k[3] != q[3] || !k[1] || q[1] % k[1])
    refuse("queries, keys and values do not fit");
  fewbits_few few = {q[0], q[1], k[1], q[2], k[2], q[3], v[3], query.data(), key.data(), value.data(), nullptr,
                     {}, {}, {}, {}, nullptr, float(scaling), type_of(query.scalar_type())};
  for (int i = 0; i < 3; i++) {
    few.q_strides[i] = query.strides()[i];
    few.k_strides[i] = key.strides()[i];
    few.v_strides[i] = value.strides()[i];
  }
  if (mask.count()) {
    if (mask.dim() != 4 || mask.scalar_type() != BOOL || mask.strides()[3] != 1 || mask.sizes()[3] < k[2])
      refuse("a mask is of bool, (batch, heads, queries, keys), its last dimension in one piece");
    few.mask = static_cast<const uint8_t *>(mask.data());
    for (int i = 0; i < 3; i++) {
      if (mask.sizes()[i] != 1 && mask.sizes()[i] != q[i]) refuse("a mask does not fit the queries");
      few.mask_strides[i] = mask.sizes()[i] == 1 ? 0 : mask.strides()[i];
    }
  }
  const int64_t sizes[4] = {q[0], q[2], q[1], v[3]};
  Tensor result(Tensor::empty(4, sizes, query.scalar_type()));
  few.result = result.data();
  done(fewbits_attend_few(&few, threads(), parallel), "these queries");
  stack[0] = result.give();
}

}  // namespace

extern "C" int fewbits_operators(const fewbits_torch *functions, fewbits_parallel used) {
  torch = *functions;
  parallel = used;
  void *library;
  return torch.library("fewbits", "CPU", __FILE__, __LINE__, &library) ||
         torch.implement(library, "native_linear", linear, VERSION) ||
         torch.implement(library, "native_float_linear", float_linear, VERSION) ||
         torch.implement(library, "native_attend_few", attend_few, VERSION);
}
