"""Where images come from: folders, torchvision, Arrow, shards, any callable."""
