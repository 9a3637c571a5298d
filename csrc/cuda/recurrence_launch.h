// The launchers of the recurrence on CUDA, and what only they take.
#pragma once

#include <vector>

#include "launch.h"

namespace xlstm {

// What the backward writes besides, for its own use and for the product that gives dR.
struct RecurrenceScratch {
  void* states;    // (blocks, kCheckpointInterval, S - 1, units and sequences of a block) float32
  void* h_prev;    // (B, T, H, D) dtype, contiguous: h before each step; null: dR is not wanted
  void* db_parts;  // (tiles of sequences, G, H, D) float32; null: not wanted
};

constexpr int kTeamUnits = 16;  // of a head, in a block of a team, or twice as many

// How a head is dealt to a team of blocks (recurrence_team.h).
struct RecurrenceTeams {
  int units;                  // of the head, in a block; 0: no teams, a block has all of a head
  int teams;                  // at work at a time
  int tiles;                  // products of a warp
  int near;                   // fragments of R of a thread in shared memory
  bool cluster;               // a team is one; else blocks meet in what follows
  unsigned* flags = nullptr;  // (teams, blocks of a team), zeros
  void* exchange = nullptr;   // (teams, 2, slot), zeros in the forward pass
  void* far = nullptr;  // (teams, blocks of a team, fragments, threads, 4) words: the rest of R
};

// Heads of up to `D` units in blocks of `threads`; fragments of R in all and in registers.
struct RecurrenceLaunchShape {
  bool forward;
  DType operand;  // kBFloat16 for bfloat16 r, else kFloat32
  int D, threads, fragments, held, shared_bytes;
  bool cluster = false;
};

std::vector<RecurrenceLaunchShape> recurrence_launch_shapes();
// Of teams: D is a warp's units, shared_bytes what a block of kTeamUnits has beside R and the exchange;
// fragments, which depend on the head's width, are not counted.
std::vector<RecurrenceLaunchShape> recurrence_team_shapes();

// What products with R look at. `r`: the dtype that r had before, which has all the digits there are;
// `tf32`: no more than tf32's, where r is float32.
struct Digits {
  DType r;
  bool tf32;

  // Of tensor cores, for one of float32 words.
  int products() const { return r != DType::kFloat32 ? 2 : tf32 ? 1 : 3; }
};

// `stream` is a cudaStream_t of the current device. dr and db of the arguments are not read.
void recurrence_forward_cuda(const RecurrenceForward& args, const RecurrenceTeams& teams,
                             Digits digits, void* stream);
void recurrence_backward_cuda(const RecurrenceBackward& args, const RecurrenceScratch& scratch,
                              const RecurrenceTeams& teams, Digits digits, void* stream);
// What the first runs for one step of B whole sequences without a gradient: r is of `r_dtype`.
void recurrence_step_cuda(const RecurrenceForward& args, DType r_dtype, void* stream);
// Those of the two that run where there are teams.
void recurrence_team_forward_cuda(const RecurrenceForward& args, const RecurrenceTeams& teams,
                                  Digits digits, void* stream);
void recurrence_team_backward_cuda(const RecurrenceBackward& args, const RecurrenceScratch& scratch,
                                   const RecurrenceTeams& teams, Digits digits, void* stream);

}  // namespace xlstm
