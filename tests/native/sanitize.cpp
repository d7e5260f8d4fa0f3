// The native kernels under the compiler's sanitizers (`make sanitize`): every buffer ends where it must, so
// that a byte too many is seen. Products are compared with plain loops in double, for every instruction set of
// this machine; then eight threads call at once.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "fewbits.h"

namespace {

std::mt19937_64 source(20261126);

int64_t pick(int64_t least, int64_t most) { return least + int64_t(source() % uint64_t(most - least + 1)); }

// -- numbers, by their definition --------------------------------------------------------------------

constexpr int DIGITS[3] = {8, 11, 24};  // of bfloat16, float16 and float32, the hidden one included
constexpr int FRACTION[3] = {7, 10, 23};
constexpr int BIAS[3] = {127, 15, 127};
constexpr int SIZE[3] = {2, 2, 4};

uint32_t word(const uint8_t *data, int type, int64_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, data + i * SIZE[type], SIZE[type]);
  return bits;
}

double number(const uint8_t *data, int type, int64_t i) {
  const uint32_t bits = word(data, type, i), fraction = bits & ((1u << FRACTION[type]) - 1);
  const int top = 2 * BIAS[type] + 1, exponent = int(bits >> FRACTION[type]) & top;
  const double sign = bits >> (SIZE[type] * 8 - 1) ? -1 : 1;
  if (exponent == top) return fraction ? NAN : sign * INFINITY;
  const double digits = fraction + (exponent ? double(1u << FRACTION[type]) : 0);
  return sign * std::ldexp(digits, (exponent ? exponent : 1) - BIAS[type] - FRACTION[type]);
}

// Numbers between 2^least and 2^most, of either sign, and now and then a zero.
std::vector<uint8_t> numbers(int64_t count, int type, int least, int most, bool positive) {
  std::vector<uint8_t> data(count * SIZE[type]);
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = uint32_t(BIAS[type] + pick(least, most - 1)) << FRACTION[type];
    bits |= uint32_t(source()) & ((1u << FRACTION[type]) - 1);
    if (!positive && pick(0, 1)) bits |= 1u << (SIZE[type] * 8 - 1);
    if (!positive && pick(0, 15) == 0) bits = 0;
    std::memcpy(&data[i * SIZE[type]], &bits, SIZE[type]);
  }
  return data;
}

// -- a weight ----------------------------------------------------------------------------------------

struct Case {
  fewbits_weight w{};
  std::vector<uint8_t> codes, packed, scales, zeros;
  std::vector<float> table;
  std::vector<int8_t> values;  // of a trellis
  std::vector<double> value, size;  // (out, in): the weight, and what its parts add up to at most

  Case(int64_t out, int64_t in, int bits, int group, int scale_type, int zero_type) {
    const int64_t columns = (in + group - 1) / group * group, groups = columns / group, blocks = (out + 31) / 32;
    const int64_t count = blocks * groups * 32;
    codes.resize(out * in);
    for (auto &code : codes) code = uint8_t(pick(0, (1 << bits) - 1));
    packed.resize(fewbits_packed_bytes(out, columns, bits));
    if (fewbits_pack(codes.data(), out, in, columns, bits, packed.data())) std::abort();
    scales = numbers(count, scale_type, -8, 0, true);
    if (zero_type == FEWBITS_ZERO_POINT) {
      zeros.resize(count);
      for (auto &zero : zeros) zero = uint8_t(int8_t(pick(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)));
    }
    if (zero_type == FEWBITS_OFFSET) zeros = numbers(count, FEWBITS_F32, -6, 2, false);
    if (zero_type == FEWBITS_TABLE)
      for (int i = 0; i < 16; i++) table.push_back(float(i ? pick(-2047, 2047) : 2047) / 512);  // 11 bits
    if (zero_type == FEWBITS_TRELLIS)
      for (int i = 0; i < 256; i++) values.push_back(int8_t(pick(-128, 127)));
    const void *looked_up = zero_type == FEWBITS_TABLE ? static_cast<const void *>(table.data()) : values.data();
    w = {out, in, columns, bits, group, scale_type, zero_type, packed.data(), scales.data(),
         zeros.empty() ? nullptr : zeros.data(), looked_up};
    for (int64_t row = 0; row < out; row++)
      for (int64_t column = 0; column < in; column++) {
        const int64_t at = (row / 32 * groups + column / group) * 32 + row % 32;
        const int code = codes[row * in + column], level = code - (1 << (bits - 1));
        const double scale = number(scales.data(), scale_type, at);
        double steps = zero_type == FEWBITS_TABLE ? table[code] : level, less = 0;
        if (zero_type == FEWBITS_TRELLIS) steps = values[window(row, column)];
        // A product may be summed of codes from 0, of their middle, and of high and low halves of 8 bits.
        double parts = zero_type == FEWBITS_TABLE ? std::fabs(steps) : code + (1 << (bits - 1)) + (bits == 8 ? 16 : 0);
        if (zero_type == FEWBITS_TRELLIS) parts = 256;
        if (zero_type == FEWBITS_ZERO_POINT) {
          steps -= int8_t(zeros[at]);
          parts += std::abs(int8_t(zeros[at]));
        }
        if (zero_type == FEWBITS_OFFSET) less = number(zeros.data(), FEWBITS_F32, at);
        value.push_back(scale * steps - less);
        size.push_back(scale * parts + std::fabs(less));
      }
  }

  // The last 8 bits of a column of 32 rows, which is closed.
  int window(int64_t row, int64_t column) const {
    int bits = 0;
    for (int64_t back = 3; back >= 0; back--)
      bits = bits << w.bits | codes[(row / 32 * 32 + (row + 32 - back) % 32) * w.in + column];
    return bits & 255;
  }
};

const char *name = "";

void check(bool right, const Case &c, const char *what, int type, int inputs, int64_t rows, int64_t at) {
  if (right) return;
  std::printf("%s: %s is wrong at %lld: out %lld, in %lld, bits %d, group %d, scales %d, zeros %d, "
              "type %d, inputs %d, rows %lld\n", name, what, (long long)at, (long long)c.w.out,
              (long long)c.w.in, c.w.bits, c.w.group, c.w.scale_type, c.w.zero_type, type,
              inputs, (long long)rows);
  std::exit(1);
}

// Once rounded to `type`, after `roundings` to float of what adds up to `size`.
bool near(double got, double exact, double size, int64_t roundings, int type) {
  const double before = double(roundings) * std::ldexp(size, -23);  // twice the first order
  if (std::isinf(got)) return type == FEWBITS_F16 && (got > 0 ? exact : -exact) + before >= 65520;
  return std::fabs(got - exact) <= before + std::ldexp(std::fabs(exact) + before, -DIGITS[type]) + 0x1p-25;
}

void check_unpack(const Case &c, int type) {
  std::vector<uint8_t> result(c.value.size() * SIZE[type]);
  check(fewbits_unpack(&c.w, type, result.data()) == 0, c, "the end of unpack", type, 0, 0, 0);
  for (size_t i = 0; i < c.value.size(); i++)
    check(near(number(result.data(), type, i), c.value[i], c.size[i], 2, type), c, "unpack", type, 0, 0, i);
}

// -- a product ---------------------------------------------------------------------------------------

// x (rows, in), its rows apart, and a bias.
struct Rows {
  int64_t rows, stride;
  int type;
  std::vector<uint8_t> x, bias;

  Rows(const Case &c, int64_t rows, int64_t apart, int type)
      : rows(rows), stride(c.w.in + apart), type(type),
        x(numbers(rows ? (rows - 1) * stride + c.w.in : 0, type, pick(0, 15) ? -5 : 1 - BIAS[type],
                  pick(0, 15) ? 4 : BIAS[type] / 2, false)),
        bias(numbers(pick(0, 1) ? c.w.out : 0, type, -5, 4, false)) {}
};

std::vector<uint8_t> product(const Case &c, const Rows &r, int inputs, int threads, fewbits_parallel parallel) {
  std::vector<uint8_t> y(r.rows * c.w.out * SIZE[r.type]);
  const int error = fewbits_linear(&c.w, r.x.data(), r.rows, r.stride, r.type,
                                   r.bias.empty() ? nullptr : r.bias.data(), y.data(), inputs, threads, parallel);
  check(error == 0, c, "the end of a product", r.type, inputs, r.rows, error);
  return y;
}

// What fewbits.h says is rounded together: integers times a step.
std::vector<double> in_steps(const std::vector<float> &x, int bits) {
  float most = 0;
  for (float each : x) most = std::fmax(most, std::fabs(each));
  int above = 0;  // most < 2^above
  std::frexp(most, &above);
  const float step = bits == 8 ? most / 127 : std::ldexp(1.0f, above - 15);
  const float inverse = most < 0x1p-100f ? 0 : bits == 8 ? 127 / most : 1 / step;
  std::vector<double> result;
  for (float each : x) result.push_back(std::fmin(std::nearbyint(each * inverse), 32767.0f) * double(step));
  return result;
}

std::vector<double> inputs_of(const Case &c, const uint8_t *x, int type, int inputs, int64_t from) {
  std::vector<double> line;
  const bool few = c.w.zero_type == FEWBITS_TABLE || (inputs == FEWBITS_INPUTS_8 && c.w.group == 32);
  const int64_t together = few ? 32 : 128;
  for (int64_t begin = 0; begin < c.w.in; begin += together) {
    std::vector<float> part;
    for (int64_t i = begin; i < std::min(begin + together, c.w.in); i++) part.push_back(float(number(x, type, from + i)));
    const auto value = in_steps(part, inputs == FEWBITS_INPUTS_8 ? 8 : 16);
    for (size_t i = 0; i < part.size(); i++) part[i] = float(part[i] - value[i]);
    const auto left = in_steps(part, 16);
    for (size_t i = 0; i < part.size(); i++) line.push_back(value[i] + (inputs == FEWBITS_INPUTS_32 ? left[i] : 0));
  }
  return line;
}

// Teams as OpenMP may make them: as many threads as were asked for, or the caller alone.
void team(void (*work)(void *), void *data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++) others.emplace_back(work, data);
  work(data);
  for (auto &other : others) other.join();
}

void alone(void (*work)(void *), void *data, unsigned, unsigned) { work(data); }

void check_product(const Case &c, int type, int inputs, int64_t rows, int64_t apart) {
  Rows r(c, rows, apart, type);
  const auto y = product(c, r, inputs, 1, nullptr);
  const auto right = [&](bool is, const char *what, int64_t at) { check(is, c, what, type, inputs, rows, at); };
  for (int64_t row = 0; row < rows; row++) {
    const auto line = inputs_of(c, r.x.data(), type, inputs, row * r.stride);
    for (int64_t o = 0; o < c.w.out; o++) {
      double exact = r.bias.empty() ? 0 : number(r.bias.data(), type, o), size = std::fabs(exact);
      for (int64_t i = 0; i < c.w.in; i++) {
        exact += line[i] * c.value[o * c.w.in + i];
        size += std::fabs(line[i]) * c.size[o * c.w.in + i];
      }
      const int64_t at = row * c.w.out + o;
      right(near(number(y.data(), type, at), exact, size, c.w.in + 16, type), "a product", at);
    }
  }
  right(product(c, r, inputs, 3, nullptr) == y, "a product of own threads", 0);
  right(product(c, r, inputs, 4, alone) == y, "a product of a lone thread", 0);
  if (rows == 0) return;
  // What is not a number does not vanish, and stays in its row.
  const int64_t bad = pick(0, rows - 1);
  const uint32_t bits = uint32_t(2 * BIAS[type] + 1) << FRACTION[type] | uint32_t(pick(0, 1));  // infinity, NaN
  std::memcpy(&r.x[(bad * r.stride + pick(0, c.w.in - 1)) * SIZE[type]], &bits, SIZE[type]);
  const auto spoiled = product(c, r, inputs, 1, nullptr);
  for (int64_t at = 0; at < rows * c.w.out; at++)
    if (at / c.w.out != bad)
      right(word(spoiled.data(), type, at) == word(y.data(), type, at), "a row beside NaN", at);
    else
      right(!std::isfinite(number(spoiled.data(), type, at)), "a row with NaN", at);
}

Case any_case(int64_t out, int64_t in, int inputs) {
  static const int all_bits[4] = {2, 3, 4, 8};
  int zero_type = int(pick(0, 5));
  if (zero_type == FEWBITS_TABLE && inputs == FEWBITS_INPUTS_8) zero_type = FEWBITS_MIDDLE;
  if (zero_type >= FEWBITS_TRELLIS) {  // of whole chains
    zero_type = FEWBITS_TRELLIS;
    out = (out + 31) / 32 * 32;
  }
  const int bits = zero_type == FEWBITS_TABLE ? 4 : all_bits[pick(0, zero_type == FEWBITS_TRELLIS ? 2 : 3)];
  const int group = pick(0, 3) ? 32 << pick(0, 3) : int((in + 31) / 32 * 32);  // or whole rows
  return Case(out, in, bits, group, int(pick(0, 2)), zero_type);
}

int check_products(int count) {
  int done = 0;
  for (int inputs = 0; inputs < 3; inputs++) {
    for (int64_t rows = 0; rows <= 70; rows++, done++)
      check_product(any_case(pick(1, 40), pick(1, 70), inputs), int(pick(0, 2)), inputs, rows, pick(0, 3));
    for (int64_t rows : {255, 256, 257, 600}) {
      check_product(any_case(pick(1, 5), pick(1, 40), inputs), int(pick(0, 2)), inputs, rows, 0);
      done++;
    }
    // Weights that are worth several threads.
    for (int64_t rows : {1, 7, 20}) {
      check_product(any_case(pick(300, 400), pick(2000, 2100), inputs), int(pick(0, 2)), inputs, rows, 1);
      done++;
    }
  }
  for (; done < count; done++) {
    const int inputs = int(pick(0, 2));
    const Case c = any_case(pick(1, 100), pick(1, pick(0, 3) ? 70 : 700), inputs);
    check_product(c, int(pick(0, 2)), inputs, pick(0, pick(0, 3) ? 8 : 70), pick(0, 3));
    check_unpack(c, int(pick(0, 2)));
  }
  return done;
}

// -- calls at once -----------------------------------------------------------------------------------

constexpr int CALLERS = 8, CALLS = 10000, STEPS = 50;

struct Call {
  Case c;
  Rows r;
  int inputs;
  std::vector<uint8_t> y;

  Call(int64_t out, int64_t in, int64_t rows, int inputs)
      : c(any_case(out, in, inputs)), r(c, rows, 0, int(pick(0, 2))), inputs(inputs),
        y(product(c, r, inputs, 1, nullptr)) {}
};

void check_calls() {
  std::vector<Call> calls;  // of many rows, which threads share; and one of a larger weight
  for (int i = 0; i < 16; i++) calls.emplace_back(pick(1, 40), pick(1, 70), pick(9, 24), i % 3);
  calls.emplace_back(130, 1030, 1, FEWBITS_INPUTS_8);
  team([](void *data) {
    const auto &all = *static_cast<std::vector<Call> *>(data);
    static std::atomic<int> next{0};
    const int first = next++ % CALLERS;
    for (int i = first; i < CALLS; i += CALLERS) {
      const Call &call = all[i / CALLERS % 64 == 0 ? 16 : i % 16];
      const int threads = 2 + i % 3;
      const auto y = product(call.c, call.r, call.inputs, threads, i % 100 == 0 ? team : nullptr);
      check(y == call.y, call.c, "one of many calls", call.r.type, call.inputs, call.r.rows, i);
    }
  }, &calls, CALLERS, 0);
}

void expect(bool right, const char *what, std::initializer_list<int64_t> sizes) {
  if (right) return;
  std::printf("%s: %s is wrong, of sizes", name, what);
  for (int64_t size : sizes) std::printf(" %lld", (long long)size);
  std::printf("\n");
  std::exit(1);
}

// Steps of one thread, and of several at once, whose helpers wait awake between products, or have gone to sleep.
// Products come in an order that changes now and then, so that what is read ahead is another's, or nobody's.
void check_steps() {
  std::vector<Call> calls;
  for (int i = 0; i < 12; i++) calls.emplace_back(pick(60, 200), pick(300, 1500), pick(1, 12), i % 3);
  const auto steps = [](void *data) {
    static std::atomic<int> next{0};
    struct Step {
      const std::vector<Call> &calls;
      int number;
    } step{*static_cast<std::vector<Call> *>(data), 0};
    const bool pool = next++ % 2;
    for (; step.number < STEPS; step.number++) {
      const int error = fewbits_together([](void *data) {
        const Step &step = *static_cast<Step *>(data);
        for (int i = 0; i < 12; i++) {
          const Call &call = step.calls[(step.number / 5 + i) % (step.number % 7 ? 12 : 5)];
          if (step.number % 50 == 49 && i == 6) std::this_thread::sleep_for(std::chrono::milliseconds(4));
          const auto y = product(call.c, call.r, call.inputs, 3, nullptr);
          check(y == call.y, call.c, "a product of a step", call.r.type, call.inputs, call.r.rows, step.number);
        }
      }, &step, 3, pool ? nullptr : team);
      expect(!error, "a step", {error});
    }
  };
  for (int i = 0; i < 4; i++) steps(&calls);
  team(steps, &calls, 2, 0);
  team(steps, &calls, CALLERS, 0);
}

// -- the rest ----------------------------------------------------------------------------------------

void check_stream() {
  for (int64_t bytes : {0, 1, 63, 64, 65, 4096, 100000, 640000, 1000000}) {
    std::vector<uint64_t> data(bytes / 8 + 1);
    for (auto &each : data) each = source();
    std::vector<uint8_t> exact(reinterpret_cast<uint8_t *>(data.data()),
                               reinterpret_cast<uint8_t *>(data.data()) + bytes);
    uint64_t all = 0;
    for (int64_t i = 0; i < bytes / 8; i++) all ^= data[i];
    for (int threads : {1, 2, 5})
      for (fewbits_parallel parallel : {fewbits_parallel(nullptr), fewbits_parallel(team)}) {
        const uint64_t got = fewbits_stream(exact.data(), bytes, threads, parallel);
        if (bytes % 64 == 0 && got != all) {
          std::printf("stream: %lld bytes in %d threads are wrong\n", (long long)bytes, threads);
          std::exit(1);
        }
      }
  }
}

// Each is one thing wrong; nothing may be read or written.
void check_refusals() {
  const Case c(5, 40, 4, 32, FEWBITS_F32, FEWBITS_MIDDLE);
  int refused = 0;
  const auto linear = [&](const fewbits_weight &w, int64_t rows, int type, int inputs) {
    refused += fewbits_linear(&w, nullptr, rows, 40, type, nullptr, nullptr, inputs, 1, nullptr) != 0;
  };
  const auto with = [&](auto change) {
    fewbits_weight w = c.w;
    change(w);
    linear(w, 1, FEWBITS_F32, FEWBITS_INPUTS_16);
    refused += fewbits_unpack(&w, FEWBITS_F32, nullptr) != 0;
  };
  with([](auto &w) { w.bits = 5; });
  with([](auto &w) { w.columns = 33; });
  with([](auto &w) { w.columns = 32; });
  with([](auto &w) { w.group = 0; });
  with([](auto &w) { w.group = 48; });
  with([](auto &w) { w.out = -1; });
  with([](auto &w) { w.scale_type = 3; });
  with([](auto &w) { w.zero_type = 5; });
  with([](auto &w) { w.zero_type = FEWBITS_TRELLIS; });
  with([](auto &w) { w.zero_type = FEWBITS_TRELLIS, w.out = 32, w.bits = 8; });
  linear(c.w, -1, FEWBITS_F32, FEWBITS_INPUTS_16);
  linear(c.w, 1, 3, FEWBITS_INPUTS_16);
  linear(c.w, 1, FEWBITS_F32, 3);
  refused += fewbits_unpack(&c.w, 3, nullptr) != 0;
  for (int bits : {0, 1, 5, 6, 7, 9}) refused += fewbits_pack(nullptr, 1, 32, 32, bits, nullptr) != 0;
  refused += fewbits_pack(nullptr, 1, 33, 32, 4, nullptr) != 0;
  refused += fewbits_use(5) != 0;
  if (refused != 20 + 3 + 1 + 6 + 1 + 1) {
    std::printf("of 32 wrong arguments %d were refused\n", refused);
    std::exit(1);
  }
}

}  // namespace

// -- what calibration calls ---------------------------------------------------------------------------

std::vector<float> floats(int64_t count, float least, float most) {
  std::vector<float> data(count);
  for (auto &each : data) each = least + (most - least) * float(source() % 65536) / 65536;
  return data;
}

void check_gram() {
  const int64_t rows = pick(0, 150), columns = pick(1, 300), stride = columns + pick(0, 3), width = 64 * pick(1, 3);
  const auto x = numbers(rows ? (rows - 1) * stride + columns : 0, FEWBITS_BF16, -3, 3, false);
  std::vector<std::vector<float>> panels;
  std::vector<float *> places;
  for (int64_t start = 0; start < columns; start += width)
    panels.emplace_back((columns - start) * std::min(width, columns - start));
  for (auto &panel : panels) places.push_back(panel.data());
  expect(!fewbits_gram(x.data(), rows, columns, stride, places.data(), width, int(pick(1, 3)), team), "a gram's end",
         {rows, columns, stride, width});
  for (int64_t i = 0; i < columns; i++)
    for (int64_t j = 0; j <= i; j++) {
      double sum = 0, size = 0;
      for (int64_t r = 0; r < rows; r++) {
        const double one = number(x.data(), FEWBITS_BF16, r * stride + i) * number(x.data(), FEWBITS_BF16, r * stride + j);
        sum += one, size += std::fabs(one);
      }
      const int64_t start = j / width * width, own = std::min(width, columns - start);
      const double got = panels[j / width][(i - start) * own + j - start];
      expect(near(got, sum, size, rows + 2, FEWBITS_F32), "a gram", {rows, columns, stride, width, i, j});
    }
}

void check_attention() {
  fewbits_attention a{};
  const int64_t shared = pick(1, 3);
  a.batch = pick(1, 2), a.groups = pick(1, 2), a.heads = shared * a.groups, a.causal = int(pick(0, 1));
  a.keys = pick(1, 150), a.queries = a.causal ? a.keys : pick(1, 150), a.width = pick(1, 70), a.value_width = pick(1, 140);
  a.scaling = 0.3f;
  const auto strides = [](int64_t *to, int64_t heads, int64_t tokens, int64_t width) {
    to[2] = width, to[1] = tokens * width, to[0] = heads * tokens * width;
    return to[0];
  };
  const auto q = numbers(a.batch * strides(a.q_strides, a.heads, a.queries, a.width), FEWBITS_BF16, -2, 2, false);
  const auto k = numbers(a.batch * strides(a.k_strides, a.groups, a.keys, a.width), FEWBITS_BF16, -2, 2, false);
  const auto v = numbers(a.batch * strides(a.v_strides, a.groups, a.keys, a.value_width), FEWBITS_BF16, -2, 2, false);
  std::vector<uint8_t> result(2 * a.batch * a.queries * a.heads * a.value_width);
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.result = result.data();
  const auto sizes = {a.batch, a.heads, a.groups, a.queries, a.keys, a.width, a.value_width, int64_t(a.causal)};
  expect(!fewbits_attend(&a, int(pick(1, 3)), team), "attention's end", sizes);
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++)
      for (int64_t i = 0; i < a.queries; i++) {
        std::vector<double> weight(a.causal ? i + 1 : a.keys);
        double most = -INFINITY, all = 0;
        for (size_t j = 0; j < weight.size(); j++) {
          double dot = 0;
          for (int64_t d = 0; d < a.width; d++)
            dot += number(q.data(), FEWBITS_BF16, ((b * a.heads + h) * a.queries + i) * a.width + d) *
                   number(k.data(), FEWBITS_BF16, ((b * a.groups + h / shared) * a.keys + int64_t(j)) * a.width + d);
          weight[j] = dot * a.scaling;
          most = std::fmax(most, weight[j]);
        }
        for (auto &each : weight) all += each = std::exp(each - most);
        for (int64_t d = 0; d < a.value_width; d++) {
          double sum = 0, size = 0;
          for (size_t j = 0; j < weight.size(); j++) {
            const double one = weight[j] / all *
                number(v.data(), FEWBITS_BF16, ((b * a.groups + h / shared) * a.keys + int64_t(j)) * a.value_width + d);
            sum += one, size += std::fabs(one);
          }
          const double got = number(result.data(), FEWBITS_BF16, ((b * a.queries + i) * a.heads + h) * a.value_width + d);
          expect(std::fabs(got - sum) <= 0x1p-8 * std::fabs(sum) + 0x1p-7 * size, "attention", sizes);
        }
      }
}

// Each column is at the place nearest to where the errors of the others, as they were or are, leave it.
void check_columns() {
  const int64_t columns = pick(1, 150), rows = pick(1, 300), groups = pick(1, 3), side = (columns + 63) / 64;
  const bool upper = pick(0, 1), costed = pick(0, 1);
  const auto weights = floats(columns * rows, -1, 1), before = floats(columns * rows, -0.1f, 0.1f);
  const auto steps = floats(groups * rows, 0.1f, 0.3f), shares = floats(columns * columns, -0.1f, 0.1f);
  std::vector<float> inverse, low(groups * rows, -8), squares(side * side * 64 * 64), costs = floats(columns, 0, 1);
  for (float step : steps) inverse.push_back(1 / step);
  for (int64_t i = 0; i < columns; i++)
    for (int64_t j = 0; j < columns; j++)
      squares[((i / 64 * side + j / 64) * 64 + i % 64) * 64 + j % 64] = shares[i * columns + j];
  std::vector<int64_t> group(columns);
  for (auto &each : group) each = pick(0, groups - 1);
  std::vector<float> errors = before, losses(rows);
  const fewbits_columns c{columns, rows, weights.data(), errors.data(), squares.data(), steps.data(), inverse.data(),
                          low.data(), group.data(), costed ? costs.data() : nullptr,
                          costed ? losses.data() : nullptr, 15, upper};
  expect(!fewbits_round_columns(&c, int(pick(1, 3)), team), "the end of columns", {columns, rows, groups});
  for (int64_t r = 0; r < rows; r++) {
    double lost = 0;
    for (int64_t k = 0; k < columns; k++) {
      const double step = steps[group[k] * rows + r];
      double moved = 0;
      for (int64_t j = 0; j < (upper ? k : columns); j++)
        if (j != k) moved += shares[j * columns + k] * double((j < k ? errors : before)[j * rows + r]);
      const double wanted = (weights[k * rows + r] + moved) / step, bounded = std::fmin(std::fmax(wanted, -8), 7);
      const double place = (weights[k * rows + r] - errors[k * rows + r]) / step;
      expect(std::fabs(place - std::nearbyint(place)) < 1e-3 && std::fabs(place - bounded) < 0.5 + 1e-3, "a column",
             {columns, rows, groups, upper, r, k});
      lost += costs[k] * (wanted - place) * (wanted - place) * step * step;
    }
    expect(!costed || std::fabs(losses[r] - lost) <= 1e-3 * lost + 1e-5, "a loss", {columns, rows, groups, upper, r});
  }
}

void check_grids() {
  fewbits_grids g{};
  g.rows = pick(0, 20), g.groups = pick(1, 3), g.columns = g.groups * pick(1, 100), g.stride = g.columns + pick(0, 3);
  g.tried = pick(0, 4), g.range = 15;
  const auto weights = floats(g.rows ? (g.rows - 1) * g.stride + g.columns : 0, -1, 1), costs = floats(g.columns, 0, 1);
  const auto steps = floats(g.tried * g.rows * g.groups, 0.05f, 0.3f);
  const std::vector<float> points(g.rows * g.groups, 8);
  std::vector<float> errors(steps.size());
  g.weights = weights.data(), g.costs = costs.data(), g.steps = steps.data(), g.points = points.data();
  g.errors = errors.data();
  expect(!fewbits_grid_errors(&g, int(pick(1, 3)), team), "the end of grids", {g.rows, g.columns, g.groups});
  const int64_t size = g.columns / g.groups;
  for (int64_t at = 0; at < int64_t(steps.size()); at++) {
    const int64_t row = at / g.groups % g.rows, first = at % g.groups * size;
    double sum = 0;
    for (int64_t k = first; k < first + size; k++) {
      const double weight = weights[row * g.stride + k], step = steps[at];
      const double error = std::fmin(std::fmax(std::nearbyint(weight / step), -8), 7) * step - weight;
      sum += costs[k] * error * error;
    }
    expect(std::fabs(errors[at] - sum) <= 1e-3 * sum + 1e-6, "a grid", {g.rows, g.columns, g.groups, at});
  }
}

// `sanitize COUNT`: of products for each instruction set.
int main(int arguments, char **argument) {
  const int count = arguments > 1 ? std::atoi(argument[1]) : 1000;
  static const char *const names[] = {"portable", "neon", "avx2", "avx512", "amx"};
  check_refusals();
  check_stream();
  for (int isa = 0; isa < 5; isa++) {
    name = names[isa];
    if (fewbits_use(isa)) {
      std::printf("%s: not of this machine\n", name);
      continue;
    }
    const int done = check_products(count);
    check_calls();
    check_steps();
    for (int i = 0; i < 1 + count / 50; i++) {
      check_columns(), check_grids();
      if (fewbits_has_bf16()) check_gram(), check_attention();
    }
    std::printf("%s: %d products, and %d calls and %d steps of up to %d threads, are right\n", name, done, CALLS,
                (4 + 2 + CALLERS) * STEPS, CALLERS);
    std::fflush(stdout);
  }
  return 0;
}
