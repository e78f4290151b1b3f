"""Encoded datasets on disk: safetensors shards with a JSON index, written by `encode`, streamed by `train`.

shards/index.json                    how it was encoded; when it is complete, also its shards and examples
shards/shard-00003-00001.json        the rows of the second shard of part 3 of the source
shards/shard-00003-00001.safetensors their tensors
"""
