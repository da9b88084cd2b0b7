"""Real pretrained models without a model hub: weights that packages of the Python index carry, as folders for vLLM."""
