"""The MoE block and its parts: pure functions over arrays, usable without Flax.

A token's way: `routing` chooses its experts, `capacity` gives it slots, `run_experts` carries it to
its experts and back, `experts` computes, and `block` puts these together. `part` has the settings.
`balance` and `bias` keep the load of the experts even, and `statistics` measures it.

Legend of shapes, for names (`x_GSM`) and einsums. A letter has one meaning, except where a module
or a function gives it another:

  B  batch (sequences)              G  groups of tokens: capacity is counted in a group
  L  length of a sequence           S  tokens of a group; G * S = B * L
  T  length of keys and values      E  experts
  M  model dim                      K  experts per token (its choices, best first)
  H  hidden dim of an FFN           C  capacity: slots of an expert in a group
  N  attention heads                A  assignments of a group, S * K of them, in some order
  D  head dim                       J  tokens of all groups, G * S
  V  vocabulary                     R  rows, one per choice: J * K, sorted by expert
  X  MoE layers of a model          P  slots of a group, E * C
  I  input dim of any matrix        U  units over which a balance loss is taken
  O  output dim of any matrix       W  taps of a convolution
  Z  state of a recurrence          F  latent of keys and values
  Q  devices that share the experts

A dim of size one is written 1. Letters mean logical dims, not the shards of a device.
"""
