"""From a checkpoint or a policy to samples and their scores."""
