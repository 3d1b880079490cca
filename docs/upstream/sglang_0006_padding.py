"""After a batch that DP attention padded, out_cache_loc keeps the padding that positions and requests lose."""

from types import SimpleNamespace

import torch
from sglang_engine import enable_cpu

if __name__ == "__main__":
    enable_cpu()
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    two = torch.tensor([5, 6])
    batch = ForwardBatch(ForwardMode.DECODE, 2, two, two, two, two, 11, positions=two, _original_batch_size=2)
    fill = SimpleNamespace(get_cpu_graph_seq_len_fill_value=lambda: 1)
    batch._pad_inputs_to_size(SimpleNamespace(attn_backend=fill), num_tokens=4, bs=4)
    batch.post_forward_mlp_sync_batch(SimpleNamespace(next_token_logits=torch.zeros(4, 1), hidden_states=None))
    print("a rank with tokens [5, 6], after a pass that was padded to four:")
    for name in ("positions", "req_pool_indices", "out_cache_loc"):
        print(f"{name}: {getattr(batch, name).tolist()}")
