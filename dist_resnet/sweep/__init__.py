"""Many runs from one file of values: python -m dist_resnet.sweep FILE.yaml ..."""
