// x @ W.T straight from codes: the C interface. Python reaches it through ctypes, and PyTorch through its own C
// interface (operators.cpp), so that one library serves every version of Python and torch. No function allocates what
// outlives a call, but for `fewbits_operators`, or throws: it returns 0, or a number that says what it was given wrongly.
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define FEWBITS_API __attribute__((visibility("default")))
#else
#define FEWBITS_API
#endif

// Counts up with every change of this file that library.py must know of, so that a library that was built
// before is not called.
#define FEWBITS_INTERFACE 16

#ifdef __cplusplus
extern "C" {
#endif

FEWBITS_API int fewbits_interface(void);

// How numbers are stored.
enum { FEWBITS_BF16 = 0, FEWBITS_F16 = 1, FEWBITS_F32 = 2 };

// What is taken off a code before it is scaled.
enum {
  FEWBITS_MIDDLE = 0,      // 2^(bits-1)
  FEWBITS_ZERO_POINT = 1,  // `zeros` is int8, distances from it: scale * (code - middle - zero), at most the middle
  FEWBITS_OFFSET = 2,      // `zeros` is float: scale * (code - middle) - zero
  FEWBITS_TABLE = 3,       // a code is looked up: scale * table[code], which has 11 bits; not with INPUTS_8
  FEWBITS_TRELLIS = 4,     // 8 bits are looked up, of codes of the row and of those before it: pack.cpp
};

// How exactly x is taken: as integers times a step that neighbours in a row share. What shares a step and
// the scale of the weights is summed exactly.
enum {
  FEWBITS_INPUTS_16 = 0,  // 128 columns (32 for a table), a power of two: the largest is 2^14 to 2^15 steps
  FEWBITS_INPUTS_8 = 1,   // 128 columns, or a group of 32: the largest is 127 steps
  FEWBITS_INPUTS_32 = 2,  // as 16, and what is left of x as 16 once more: as exact as float, twice the work
};

// Instruction sets, the later ones preferred.
enum { FEWBITS_PORTABLE = 0, FEWBITS_NEON = 1, FEWBITS_AVX2 = 2, FEWBITS_AVX512 = 3, FEWBITS_AMX = 4 };

// A weight in the layout that kernels stream. Rows are in blocks of 32, columns padded to `columns`,
// a multiple of 32; see pack.cpp for the order of the bytes.
typedef struct {
  int64_t out;      // rows of W; of a trellis a multiple of 32
  int64_t in;       // columns of W
  int64_t columns;  // `in`, padded: a multiple of `group`
  int32_t bits;     // 2, 3, 4 or 8
  int32_t group;    // columns that share a scale: a multiple of 32
  int32_t scale_type;
  int32_t zero_type;
  const uint8_t *codes;  // (blocks of 32 rows, columns), 4 * bits bytes a column of a block
  const void *scales;    // (blocks, groups, 32)
  const void *zeros;     // (blocks, groups, 32) int8 or float; NULL where there is a middle or a table
  const void *table;     // float (16,) of 4-bit codes; int8 (256,) of a trellis, which has up to 4 bits
} fewbits_weight;

// Runs `work(data)` in `threads` threads at once, the caller among them. GOMP_parallel is such a
// function: torch's own threads are used where torch has them.
typedef void (*fewbits_parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

// The best instruction set that this library holds and this machine runs; `fewbits_use` takes another
// (for tests; returns 1 where it cannot).
FEWBITS_API int fewbits_isa(void);
FEWBITS_API int fewbits_use(int isa);

// Bytes of `codes`, and codes (out, in) one to a byte -> that layout. `columns` as above.
FEWBITS_API int64_t fewbits_packed_bytes(int64_t out, int64_t columns, int bits);
FEWBITS_API int fewbits_pack(const uint8_t *codes, int64_t out, int64_t in, int64_t columns, int bits,
                             uint8_t *packed);

// Layout -> weights (out, in) in `type`, each rounded once.
FEWBITS_API int fewbits_unpack(const fewbits_weight *w, int type, void *result);

// y (rows, out) = x (rows, in) @ W.T + bias, all in `type`; rows of x are `stride` apart, bias (out,) may
// be NULL. `parallel` NULL: threads of our own.
FEWBITS_API int fewbits_linear(const fewbits_weight *w, const void *x, int64_t rows, int64_t stride,
                               int type, const void *bias, void *y, int inputs, int threads,
                               fewbits_parallel parallel);

// The same with a weight (out, in) in `type`, which is FEWBITS_BF16: few rows as fast as it can be read, summed
// in float32.
FEWBITS_API int fewbits_float_linear(const void *weight, int64_t out, int64_t in, const void *x, int64_t rows,
                                     int64_t stride, int type, const void *bias, void *y, int threads,
                                     fewbits_parallel parallel);

// softmax(scaling * Q K.T) V of few queries, in float32, rounded once. Strides are in numbers, of all dimensions
// but the last, which lies together.
typedef struct {
  int64_t batch;
  int64_t heads;
  int64_t groups;      // heads / groups neighbours share keys and values
  int64_t queries;
  int64_t keys;
  int64_t width;
  int64_t value_width;
  const void *q;        // (batch, heads, queries, width)
  const void *k;        // (batch, groups, keys, width)
  const void *v;        // (batch, groups, keys, value_width)
  const uint8_t *mask;  // (batch, heads, queries, keys): 1 where a query sees a key; NULL: it sees all
  int64_t q_strides[3];
  int64_t k_strides[3];
  int64_t v_strides[3];
  int64_t mask_strides[3];
  void *result;         // (batch, queries, heads, value_width) in one piece; zeros where no key is seen
  float scaling;
  int32_t type;         // FEWBITS_BF16 or FEWBITS_F32
} fewbits_few;

FEWBITS_API int fewbits_attend_few(const fewbits_few *few, int threads, fewbits_parallel parallel);

// Functions of PyTorch's stable C interface; each returns 0, or a number that says that it failed.
typedef struct {
  int (*data)(void *tensor, void **data);
  int (*dim)(void *tensor, int64_t *dim);
  int (*sizes)(void *tensor, int64_t **sizes);
  int (*strides)(void *tensor, int64_t **strides);
  int (*type)(void *tensor, int32_t *type);
  int (*empty)(int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t type, int32_t device_type,
               int32_t device, void **tensor);
  int (*copy)(void *tensor, void *source, int32_t non_blocking);
  int (*release)(void *tensor);
  int (*threads)(uint32_t *count);
  int (*library)(const char *name, const char *key, const char *file, uint32_t line, void **library);
  int (*implement)(void *library, const char *name, void (*)(uint64_t *stack, uint64_t given, uint64_t results),
                   uint64_t version);
} fewbits_torch;

// Let the operators that operators.py defines be these functions, in torch's threads or in `parallel`. Called once.
FEWBITS_API int fewbits_operators(const fewbits_torch *functions, fewbits_parallel parallel);

// Codes (chains, 32) of the closed chains of a trellis whose squared errors against x (chains, 32) are least;
// 2, 3 or 4 bits. scale (chains, 32) is what entries of the table (256,) are multiplied by. See trellis.py.
FEWBITS_API int fewbits_find_chains(const float *x, const float *scale, const float *table, int64_t chains,
                                    int bits, uint8_t *codes, int threads, fewbits_parallel parallel);

// Run `work(data)` in the caller, and keep threads - 1 others of `parallel` awake meanwhile for all that it asks of
// this library, in its thread. PyTorch's own operations run in one thread there. Alone where another such call runs.
FEWBITS_API int fewbits_together(void (*work)(void *), void *data, int threads, fewbits_parallel parallel);

// Read `bytes` once with `threads` threads and return their xor: the limit that kernels are held to.
FEWBITS_API uint64_t fewbits_stream(const void *data, int64_t bytes, int threads,
                                    fewbits_parallel parallel);

// Columns of a matrix that are rounded one after the other, each to the place nearest to where the errors of
// the others leave it (methods/gptq.py). Each column is in one piece of memory.
typedef struct {
  int64_t columns;
  int64_t rows;
  const float *weights;   // (columns, rows), not rounded
  float *errors;          // (columns, rows), what rounding has left of the weights; replaced
  const float *shares;    // of the error of the first column, what the second takes up: (n, n, 64, 64), in
                          // squares of 64 x 64, filled up
  const float *steps;     // of the grid, (groups, rows)
  const float *inverse;   // 1 / step
  const float *low;       // the least integer on it
  const int64_t *groups;  // of each column, its row in these
  const float *costs;     // (columns,) of a squared distance from that place; NULL
  float *losses;          // (rows,), what rounding has cost; NULL if there are no costs
  float range;            // from the least integer to the largest
  int32_t upper;          // 1: columns take up errors of those before them alone; 0: of all others
} fewbits_columns;

// What rounding the weights of each row to several grids costs, by group.
typedef struct {
  int64_t rows;
  int64_t columns;
  int64_t stride;  // elements from row to row
  int64_t groups;  // of a row, alike
  int64_t tried;   // grids
  const float *weights;
  const float *costs;   // (columns,), of a squared error
  const float *steps;   // (tried, rows, groups)
  const float *points;  // the zero points, (rows, groups)
  float range;          // the largest code
  float *errors;        // (tried, rows, groups), the sum over a group of cost * squared error
} fewbits_grids;

FEWBITS_API int fewbits_grid_errors(const fewbits_grids *grids, int threads, fewbits_parallel parallel);

// The bits do not depend on threads.
FEWBITS_API int fewbits_round_columns(const fewbits_columns *columns, int threads, fewbits_parallel parallel);

// X.T @ X, of X (rows, columns) in bfloat16 with rows `stride` apart, added to its lower panels in float:
// panel i, (columns - i * width, width), has columns from i * width on of the rows from there on. `width` is a
// multiple of 64. The bits do not depend on threads. Only where `fewbits_has_bf16` is 1.
FEWBITS_API int fewbits_has_bf16(void);
FEWBITS_API int fewbits_gram(const void *x, int64_t rows, int64_t columns, int64_t stride, float *const *panels,
                             int64_t width, int threads, fewbits_parallel parallel);

// softmax(scaling * Q K.T) V in bfloat16, sums in float. Strides, in values, are those of samples, heads and
// tokens; a token of a head is in one piece.
typedef struct {
  int64_t batch;
  int64_t heads;
  int64_t groups;       // heads of keys, each shared by heads / groups neighbours
  int64_t queries;
  int64_t keys;
  int64_t width;        // of queries and keys
  int64_t value_width;
  const void *q;        // (batch, heads, queries, width)
  const void *k;        // (batch, groups, keys, width)
  const void *v;        // (batch, groups, keys, value_width)
  int64_t q_strides[3];
  int64_t k_strides[3];
  int64_t v_strides[3];
  void *result;         // (batch, queries, heads, value_width)
  float scaling;
  int32_t causal;       // a query sees keys up to its own number; there are as many queries as keys
} fewbits_attention;

// The bits do not depend on threads. Only where `fewbits_has_bf16` is 1.
FEWBITS_API int fewbits_attend(const fewbits_attention *attention, int threads, fewbits_parallel parallel);

#ifdef __cplusplus
}
#endif
