"""What a method costs on a model of a given shape: ``python -m accelerate_methods.bench``. See docs/efficiency.md."""

#: what is measured unless the user says otherwise
VIDEO_METHODS = "dense fastvid@0.25 fastvid@0.1 fastv dycoke prunevid visionzip@0.1"
IMAGE_METHODS = "dense fastv visionzip@0.25 visionzip@0.1 fastervlm@0.1"
