"""ResNet backbones whose BatchNorm works on groups of samples, and their heads."""
