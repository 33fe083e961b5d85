"""The MoE block and its parts: pure functions over arrays, usable without Flax.

For each token, `routing` chooses experts and `capacity` assigns slots. `run_experts` moves tokens
to their experts and back, and `experts` computes. `block` combines these steps; `part` contains the
settings. `balance` and `bias` keep expert loads even, and `statistics` measures them.

Legend of shapes in names (`x_GSM`) and einsums. A letter has one meaning unless a module or a
function redefines it:

  B  batch (sequences)              G  groups of tokens; capacity is per group
  L  length of a sequence           S  tokens per group; G * S = B * L
  T  length of keys and values      E  experts
  M  model dim                      K  experts per token (its choices, best first)
  H  hidden dim of an FFN           C  capacity: slots per expert and group
  N  attention heads                A  choices of a group, S * K, in any order
  D  head dim                       J  tokens of all groups, G * S
  V  vocabulary                     R  rows, one per choice: J * K, sorted by expert
  X  MoE layers of a model          P  slots per group, E * C
  I  input dim of any matrix        U  units over which a balance loss takes means
  O  output dim of any matrix       W  taps of a convolution
  Z  state of a recurrence          F  latent dim of keys and values
  Q  devices that experts are split over

A dim of size one is written 1. Letters are logical dims, not the shards of a device.
"""
