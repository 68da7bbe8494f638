// What the lanes of a warp do together: shuffles, votes, warp barriers, matrix units, and asynchronous copies.
//
// Operand layouts: PTX ISA 9.0, 9.7.14 (mma, ldmatrix); AMD "CDNA3 instruction set architecture" 7.1 (MFMA) and
// "RDNA3" 7.9 and "RDNA4" 7.12 (WMMA). A product's sum is taken in float32 in rising k; the devices' own order differs.
#include "units.h"

#include "state.h"

namespace {

constexpr uint16_t PENDING = 16;  // as in memory.cc

float value_of(_Float16 x) { return (float)x; }
float value_of(Bits16 x) { return __builtin_bit_cast(float, (uint32_t)x.bits << 16); }

template <class Body>
void each(Group &group, Body body) {
  for (unsigned i = 0; i < group.width; i++)
    if (group.present >> i & 1) {
      machine.current = group.lanes[i];
      body(*group.lanes[i], i);
      if (machine.fault.kind) return;
    }
}

template <class T>
T &payload(Group &group, unsigned lane) {
  return *(T *)group.lanes[lane]->payload;
}

// Matrix units read every lane's registers.
bool all_take_part(Group &group) {
  uint64_t all = machine.launch->warp == 64 ? ~0ull : (1ull << machine.launch->warp) - 1;
  if (group.present == all) return true;
  Fault *f = begin_fault(FAULT_LANES, machine.current->place);
  f->detail = "a matrix instruction needs every lane of the warp";
  return false;
}

struct Shuffle {
  uint64_t value, result;
  int source;
};

void shuffle(Group &group) {
  each(group, [&](Lane &lane, unsigned i) {
    Shuffle &mine = payload<Shuffle>(group, i);
    if (group.has(mine.source)) {
      mine.result = payload<Shuffle>(group, mine.source).value;
      return;
    }
    Fault *f = begin_fault(FAULT_SHUFFLE, lane.place);
    f->offset = mine.source;
    f->size = group.width;
  });
}

template <class Sum>
struct MmaOperands {
  uint32_t a[4], b[2];
  Sum c[4];  // C before, D after
};

struct LoadMatrices {
  int count;
  bool transposed;
  const void *row;
  uint32_t words[4];
};

struct SimdgroupOperands {
  float a[2], b[2], c[2];
};

struct Ballot {
  bool vote;
  uint64_t result;
};

void ballot(Group &group) {
  uint64_t votes = 0;
  each(group, [&](Lane &, unsigned i) { votes |= (uint64_t)payload<Ballot>(group, i).vote << i; });
  each(group, [&](Lane &, unsigned i) { payload<Ballot>(group, i).result = votes; });
}

void warp_barrier(Group &group) {
  for (unsigned i = 0; i < group.width; i++)
    if (!(group.present >> i & 1)) {
      Fault *f = begin_fault(FAULT_BARRIER, machine.current->place);
      f->other_thread = group.lanes[i]->thread, f->other_block = machine.block;
      f->other_place = group.lanes[i]->state == LANE_DONE ? 0 : group.lanes[i]->place;
      f->detail = group.lanes[i]->state == LANE_DONE ? "has ended" : "waits elsewhere";
      return;
    }
  uint32_t now = ++machine.clock;
  unsigned spaces = *(unsigned *)machine.current->payload;
  for (unsigned s = 0; s < 2; s++)
    if (spaces >> s & 1) machine.warp_time[group.warp][s] = now;
}

// D[rows][columns] = A[rows][depth] · B[depth][columns] + C
template <int R, int C, int K, class Number = float>
struct Tile {
  Number a[R][K], b[K][C], c[R][C];
  // Sums of integers wrap around, as the devices' do unless asked to saturate.
  void multiply() {
    for (int k = 0; k < K; k++)
      for (int r = 0; r < R; r++)
        for (int j = 0; j < C; j++) c[r][j] += a[r][k] * b[k][j];
  }
};

// Bytes as numbers.
struct S8 {
  using Sum = uint32_t;
  static uint32_t number(uint32_t word, int byte) { return (uint32_t)(int32_t)(int8_t)(word >> (8 * byte)); }
};
struct E4M3 {
  using Sum = float;
  // OCP 8-bit floating point: sign, four bits of exponent, bias 7, three of mantissa; S.1111.111 is NaN.
  static float number(uint32_t word, int byte) {
    unsigned code = word >> (8 * byte) & 255, exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 127) == 127) return __builtin_nanf("");
    float size = exponent ? __builtin_bit_cast(float, (exponent + 120) << 23 | mantissa << 20) : mantissa / 512.0f;
    return code & 128 ? -size : size;
  }
};

template <class T>
float half_of(uint32_t word, int which) {
  uint16_t bits = (uint16_t)(word >> (16 * which));
  return value_of(__builtin_bit_cast(T, bits));
}

// mma.m16n8k16: A in 4 words, B in 2, C in 4 floats a lane.
template <class T>
void mma_m16n8k16(Group &group) {
  if (!all_take_part(group)) return;
  static Tile<16, 8, 16> t;
  for (int l = 0; l < 32; l++) {
    MmaOperands<float> &o = payload<MmaOperands<float>>(group, l);
    int g = l / 4, m = l % 4 * 2;
    for (int e = 0; e < 2; e++) {
      for (int i = 0; i < 4; i++) t.a[g + i % 2 * 8][m + i / 2 * 8 + e] = half_of<T>(o.a[i], e);
      for (int i = 0; i < 2; i++) t.b[m + i * 8 + e][g] = half_of<T>(o.b[i], e);
      for (int i = 0; i < 2; i++) t.c[g + i * 8][m + e] = o.c[i * 2 + e];
    }
  }
  t.multiply();
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) payload<MmaOperands<float>>(group, l).c[i] = t.c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

// mma.m16n8k32 of bytes (PTX ISA 9.0, "Matrix Fragments for mma.m16n8k32"): lane l has of A rows l/4 and l/4 + 8, of B
// column l/4, at depths 4·(l%4) to +3 and 16 further on; of C what m16n8k16 has.
template <class T>
void mma_m16n8k32(Group &group) {
  using Sum = typename T::Sum;
  if (!all_take_part(group)) return;
  static Tile<16, 8, 32, Sum> t;
  for (int l = 0; l < 32; l++) {
    auto &o = payload<MmaOperands<Sum>>(group, l);
    int g = l / 4, m = l % 4;
    for (int e = 0; e < 4; e++) {
      for (int i = 0; i < 4; i++) t.a[g + i % 2 * 8][m * 4 + i / 2 * 16 + e] = T::number(o.a[i], e);
      for (int i = 0; i < 2; i++) t.b[m * 4 + i * 16 + e][g] = T::number(o.b[i], e);
      t.c[g + e / 2 * 8][m * 2 + e % 2] = o.c[e];
    }
  }
  t.multiply();
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) payload<MmaOperands<Sum>>(group, l).c[i] = t.c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

// ldmatrix: lane 8·m + r names row r of matrix m; a lane gets two neighbours of a row (of a column, transposed).
void load_matrices(Group &group) {
  if (!all_take_part(group)) return;
  LoadMatrices &first = payload<LoadMatrices>(group, 0);
  uint16_t rows[4][8][8];
  for (int l = 0; l < first.count * 8; l++) {
    const void *row = payload<LoadMatrices>(group, l).row;
    machine.current = group.lanes[l];
    if (machine.launch->strict && !check_read(group.lanes[l], row, 16, group.lanes[l]->place)) return;
    memcpy(rows[l / 8][l % 8], row, 16);
  }
  for (int l = 0; l < 32; l++)
    for (int m = 0; m < first.count; m++) {
      uint16_t pair[2];
      for (int j = 0; j < 2; j++)
        pair[j] = first.transposed ? rows[m][l % 4 * 2 + j][l / 4] : rows[m][l / 4][l % 4 * 2 + j];
      payload<LoadMatrices>(group, l).words[m] = pair[0] | (uint32_t)pair[1] << 16;
    }
}

// v_mfma_f32_16x16x16: lane l has row (A) and column (B) l % 16, depths 4·(l/16) to +3; of D column l % 16, rows so.
template <class T>
void mfma_16x16x16(Group &group) {
  if (!all_take_part(group)) return;
  static Tile<16, 16, 16> t;
  for (int l = 0; l < 64; l++) {
    auto &o = payload<MatrixOperands<T, 4, 4>>(group, l);
    for (int j = 0; j < 4; j++) {
      t.a[l % 16][l / 16 * 4 + j] = value_of(o.a[j]);
      t.b[l / 16 * 4 + j][l % 16] = value_of(o.b[j]);
      t.c[l / 16 * 4 + j][l % 16] = o.c[j];
    }
  }
  t.multiply();
  for (int l = 0; l < 64; l++)
    for (int j = 0; j < 4; j++) payload<MatrixOperands<T, 4, 4>>(group, l).c[j] = t.c[l / 16 * 4 + j][l % 16];
}

// The integer units of AMD: A [16][16·W], B, of which lane l has N words of row and column l % 16.
// at(l, n): the first of four depths of word n. row(l, j): of D's column l % 16, the row of a lane's sum j.
template <int LANES, int N, int M, int K, class At, class Row>
void integers(Group &group, At at, Row row) {
  static Tile<16, 16, K, uint32_t> t;
  for (int l = 0; l < LANES; l++) {
    auto &o = payload<ByteOperands<N, M>>(group, l);
    for (int n = 0; n < N; n++)
      for (int e = 0; e < 4; e++) {
        t.a[l % 16][at(l, n) + e] = S8::number(o.a[n], e);
        t.b[at(l, n) + e][l % 16] = S8::number(o.b[n], e);
      }
    for (int j = 0; j < M; j++) t.c[row(l, j)][l % 16] = (uint32_t)o.c[j];
  }
  t.multiply();
  for (int l = 0; l < LANES; l++)
    for (int j = 0; j < M; j++) payload<ByteOperands<N, M>>(group, l).c[j] = (int32_t)t.c[row(l, j)][l % 16];
}

// v_mfma_i32_16x16x16_i8 of CDNA 2 (W = 1) and v_mfma_i32_16x16x32_i8 of CDNA 3 (W = 2): lane l has depths 4·W·(l/16)
// on; sums as of the floats (AMD "CDNA 2" and "CDNA3 instruction set architecture", 7.1).
template <int W>
void mfma_bytes(Group &group) {
  if (!all_take_part(group)) return;
  integers<64, W, 4, 16 * W>(
      group, [](int l, int n) { return l / 16 * 4 * W + n * 4; }, [](int l, int j) { return l / 16 * 4 + j; });
}

// v_wmma_i32_16x16x16_iu8 of gfx11 and of gfx12: depths and sums as of the floats ("RDNA3" 7.9, "RDNA4" 7.12).
void wmma_bytes_gfx11(Group &group) {
  if (!all_take_part(group)) return;
  for (int l = 0; l < 32; l++) {
    auto &o = payload<ByteOperands<4, 8>>(group, l);
    auto &twin = payload<ByteOperands<4, 8>>(group, l % 16);
    if (__builtin_memcmp(o.a, twin.a, sizeof o.a) || __builtin_memcmp(o.b, twin.b, sizeof o.b)) {
      machine.current = group.lanes[l];
      return fault(FAULT_LANES, group.lanes[l]->place, "lanes l and l + 16 of a WMMA hold the same rows and columns");
    }
  }
  integers<32, 4, 8, 16>(
      group, [](int, int n) { return n * 4; }, [](int l, int j) { return 2 * j + l / 16; });
}
void wmma_bytes_gfx12(Group &group) {
  if (!all_take_part(group)) return;
  integers<32, 2, 8, 16>(
      group, [](int l, int n) { return l / 16 * 8 + n * 4; }, [](int l, int j) { return l / 16 * 8 + j; });
}

// v_wmma_f32_16x16x16 of gfx11, 32 lanes: lanes l and l + 16 both have row and column l whole; of D rows 2·j + l/16.
template <class T>
void wmma_gfx11(Group &group) {
  if (!all_take_part(group)) return;
  static Tile<16, 16, 16> t;
  for (int l = 0; l < 32; l++) {
    auto &o = payload<MatrixOperands<T, 16, 8>>(group, l);
    auto &twin = payload<MatrixOperands<T, 16, 8>>(group, l % 16);
    if (__builtin_memcmp(o.a, twin.a, sizeof o.a) || __builtin_memcmp(o.b, twin.b, sizeof o.b)) {
      machine.current = group.lanes[l];
      return fault(FAULT_LANES, group.lanes[l]->place, "lanes l and l + 16 of a WMMA hold the same rows and columns");
    }
    for (int k = 0; k < 16; k++) t.a[l % 16][k] = value_of(o.a[k]), t.b[k][l % 16] = value_of(o.b[k]);
    for (int j = 0; j < 8; j++) t.c[2 * j + l / 16][l % 16] = o.c[j];
  }
  t.multiply();
  for (int l = 0; l < 32; l++)
    for (int j = 0; j < 8; j++) payload<MatrixOperands<T, 16, 8>>(group, l).c[j] = t.c[2 * j + l / 16][l % 16];
}

// v_wmma_f32_16x16x16 of gfx12, 32 lanes: lane l has depths 8·(l/16) to +7 of row and column l % 16; of D rows so.
template <class T>
void wmma_gfx12(Group &group) {
  if (!all_take_part(group)) return;
  static Tile<16, 16, 16> t;
  for (int l = 0; l < 32; l++) {
    auto &o = payload<MatrixOperands<T, 8, 8>>(group, l);
    for (int j = 0; j < 8; j++) {
      t.a[l % 16][l / 16 * 8 + j] = value_of(o.a[j]);
      t.b[l / 16 * 8 + j][l % 16] = value_of(o.b[j]);
      t.c[l / 16 * 8 + j][l % 16] = o.c[j];
    }
  }
  t.multiply();
  for (int l = 0; l < 32; l++)
    for (int j = 0; j < 8; j++) payload<MatrixOperands<T, 8, 8>>(group, l).c[j] = t.c[l / 16 * 8 + j][l % 16];
}

// Metal leaves open which lane holds what: here lane l has row l / 4, columns 2·(l % 4) and the next.
void multiply_8x8(Group &group) {
  if (!all_take_part(group)) return;
  static Tile<8, 8, 8> t;
  for (int l = 0; l < 32; l++) {
    SimdgroupOperands &o = payload<SimdgroupOperands>(group, l);
    for (int j = 0; j < 2; j++) {
      int r = l / 4, c = l % 4 * 2 + j;
      t.a[r][c] = o.a[j], t.b[r][c] = o.b[j], t.c[r][c] = o.c[j];
    }
  }
  t.multiply();
  for (int l = 0; l < 32; l++)
    for (int j = 0; j < 2; j++) payload<SimdgroupOperands>(group, l).c[j] = t.c[l / 4][l % 4 * 2 + j];
}

void move(const Copy &copy) {
  memcpy(copy.to, copy.from, copy.take);
  memset(copy.to + copy.take, 0, copy.bytes - copy.take);
}

// Lands the copies of groups before `group`.
void land_copies(unsigned group) {
  Lane *lane = machine.current;
  unsigned kept = 0;
  for (unsigned i = 0; i < lane->copy_count; i++) {
    const Copy copy = lane->copies[i];
    if (copy.group >= group) {
      lane->copies[kept++] = copy;
      continue;
    }
    if (!machine.copies_early) move(copy);
    if (machine.launch->strict) land(lane, copy.to, copy.bytes, copy.place);
  }
  lane->copy_count = kept;
}

uint64_t whole_warp() { return machine.launch->masks ? (machine.launch->warp == 64 ? ~0ull : (1ull << machine.launch->warp) - 1) : 0; }

}  // namespace

extern "C" {

uint64_t device_shuffle(uint64_t value, int source, uint64_t mask) {
  Shuffle mine{value, 0, source};
  together(shuffle, &mine, mask, HERE);
  return mine.result;
}

uint64_t device_ballot(bool vote, uint64_t mask) {
  Ballot mine{vote, 0};
  together(ballot, &mine, mask, HERE);
  return mine.result;
}

void device_warp_barrier(uint64_t mask, unsigned spaces) { together(warp_barrier, &spaces, mask, HERE); }

#define MMA(NAME, T)                                                                                                     \
  FourFloats NAME(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,      \
                  float c2, float c3) {                                                                                  \
    MmaOperands<float> o{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};                                                         \
    together(mma_m16n8k16<T>, &o, whole_warp(), HERE);                                                                   \
    return {o.c[0], o.c[1], o.c[2], o.c[3]};                                                                             \
  }
MMA(device_mma_f16, _Float16)
MMA(device_mma_bf16, Bits16)

FourWords device_mma_s8(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0,
                        uint32_t c1, uint32_t c2, uint32_t c3) {
  MmaOperands<uint32_t> o{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  together(mma_m16n8k32<S8>, &o, whole_warp(), HERE);
  return {o.c[0], o.c[1], o.c[2], o.c[3]};
}

FourFloats device_mma_e4m3(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                           float c1, float c2, float c3) {
  MmaOperands<float> o{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  together(mma_m16n8k32<E4M3>, &o, whole_warp(), HERE);
  return {o.c[0], o.c[1], o.c[2], o.c[3]};
}

FourWords device_load_matrices(int count, bool transposed, uint32_t row) {
  LoadMatrices o{count, transposed, device_shared_pointer(row), {}};
  together(load_matrices, &o, whole_warp(), HERE);
  return {o.words[0], o.words[1], o.words[2], o.words[3]};
}

void device_mfma_f16(void *o) { together(mfma_16x16x16<_Float16>, o, 0, HERE); }
void device_mfma_bf16(void *o) { together(mfma_16x16x16<Bits16>, o, 0, HERE); }
void device_wmma11_f16(void *o) { together(wmma_gfx11<_Float16>, o, 0, HERE); }
void device_wmma11_bf16(void *o) { together(wmma_gfx11<Bits16>, o, 0, HERE); }
void device_wmma12_f16(void *o) { together(wmma_gfx12<_Float16>, o, 0, HERE); }
void device_wmma12_bf16(void *o) { together(wmma_gfx12<Bits16>, o, 0, HERE); }
void device_mfma_i8_16(void *o) { together(mfma_bytes<1>, o, 0, HERE); }
void device_mfma_i8_32(void *o) { together(mfma_bytes<2>, o, 0, HERE); }
void device_wmma11_iu8(void *o) { together(wmma_bytes_gfx11, o, 0, HERE); }
void device_wmma12_iu8(void *o) { together(wmma_bytes_gfx12, o, 0, HERE); }

TwoFloats device_multiply_8x8(float a0, float a1, float b0, float b1, float c0, float c1) {
  SimdgroupOperands o{{a0, a1}, {b0, b1}, {c0, c1}};
  together(multiply_8x8, &o, 0, HERE);
  return {o.c[0], o.c[1]};
}

void device_copy_async(void *to, const void *from, unsigned bytes, unsigned take) {
  Lane *lane = machine.current;
  uint32_t place = HERE;
  if (take > bytes) take = bytes;
  if (machine.launch->strict && take && !check_read(lane, from, take, place)) return;
  if (machine.launch->strict && !check_write(lane, to, bytes, place, PENDING)) return;
  if (lane->copy_count == lane->copy_room) {
    lane->copy_room = lane->copy_room ? lane->copy_room * 2 : 16;
    lane->copies = (Copy *)realloc(lane->copies, lane->copy_room * sizeof(Copy));
  }
  Copy copy{(char *)to, (const char *)from, bytes, take, lane->copy_group, place};
  lane->copies[lane->copy_count++] = copy;
  if (machine.copies_early) move(copy);
}

void device_commit_copies() { machine.current->copy_group++; }

void device_wait_copies(unsigned groups) {
  unsigned committed = machine.current->copy_group;
  land_copies(committed > groups ? committed - groups : 0);
}

void device_wait_all_copies() { land_copies(~0u); }

}  // extern "C"
