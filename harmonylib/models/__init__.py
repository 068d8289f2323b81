"""The networks with their losses, the sampler, and the weights they load and save."""
