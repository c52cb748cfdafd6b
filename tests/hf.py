"Random Reformers of Hugging Face in float64, whose rotations are drawn in float32 as ours are"
import random
from contextlib import contextmanager
from unittest.mock import patch
import torch
from transformers import ReformerConfig
from transformers.models.reformer import modeling_reformer as hf
from transformers.utils import logging

logging.set_verbosity_error()
classes = dict(causal_lm=hf.ReformerModelWithLMHead, masked_lm=hf.ReformerForMaskedLM, base=hf.ReformerModel,
               sequence_classification=hf.ReformerForSequenceClassification, question_answering=hf.ReformerForQuestionAnswering)

@contextmanager
def single_draws():
    "`torch.randn` draws in float32, whatever the dtype asked for"
    draw = torch.randn
    def randn(*shape, dtype=None, **options): return draw(*shape, dtype=torch.float32, **options).to(dtype or torch.float32)
    with patch.object(torch, 'randn', randn): yield

def random_config(seed, **options):
    "A small configuration; `kinds`, the number of buckets and all else follow from the seed"
    rng = random.Random(seed)
    pick = rng.choice
    kinds = [('lsh',)*2, ('local',)*2, ('local','lsh','local'), ('lsh','local')][seed%4]
    side = pick((6, 8))
    lsh,local = pick((4, 8)),pick((3, 4, 8))
    config = dict(attn_layers=list(kinds), hidden_size=24, num_attention_heads=pick((2, 3)), attention_head_size=pick((6, 8)), feed_forward_size=pick((20, 48)),
        vocab_size=40, hidden_act=pick(('relu','gelu')), lsh_attn_chunk_length=lsh, local_attn_chunk_length=local, num_hashes=pick((1, 2, 3, 4)),
        num_buckets=pick((4, 8, [4,2], [2,4], [6], None, None)), lsh_num_chunks_after=pick((0, 0, 1)), lsh_num_chunks_before=pick((1, 1, 1, 0, 2)),
        local_num_chunks_before=pick((1, 1, 0, 2)), local_num_chunks_after=pick((0, 1)), axial_pos_embds=pick((True, True, False)), axial_pos_shape=[side, 8],
        axial_pos_embds_dim=[8, 16], max_position_embeddings=side*8, hash_seed=rng.randrange(100), is_decoder=pick((True, False)), pad_token_id=0,
        hidden_dropout_prob=0., local_attention_probs_dropout_prob=0., lsh_attention_probs_dropout_prob=0., use_cache=False,
        chunk_size_feed_forward=pick((0, 0, 1)), num_labels=3)
    return ReformerConfig(**{**config, **options})

def new_model(config, task, seed=0):
    "A model with weights large enough to attend sharply, and a bias that is not zero, in float64"
    torch.manual_seed(seed)
    model = classes[task](config).double().eval()
    with torch.no_grad():
        for name,o in model.named_parameters():
            if 'layer_norm' in name: o += .1*torch.randn_like(o)
            elif o.ndim==1: o.normal_(std=.3)
            elif 'position' in name: o.copy_(torch.randn(o.shape))   # tables that their class keeps in float32 at times
            else: o.normal_(std=.25)
    return model

def bias_of(model):
    "What release 5 forgets to add to the logits"
    return getattr(getattr(model, 'lm_head', None), 'bias', 0.)

def outputs(model, task, tokens, mask=None):
    "The logits, or what there is of the kind, as one tensor (b, n, k) or (b, k)"
    res = model(tokens, attention_mask=mask)
    if task=='base': return res.last_hidden_state
    if task=='question_answering': return torch.stack([res.start_logits, res.end_logits], -1)
    return res.logits + bias_of(model)

def our_outputs(model, task, tokens, mask=None):
    "The same of one of our models"
    res = model(tokens, mask)
    return torch.stack(res, -1) if task=='question_answering' else res

@contextmanager
def heard_buckets(model):
    "Bucket ids of each hash of a model of Hugging Face, as (b, h, r*n) without offsets between rounds"
    found,inner = [],hf.LSHSelfAttention._hash_vectors
    def hear(self, vectors, num_hashes, attention_mask, *args):
        out = inner(self, vectors, num_hashes, attention_mask, *args)
        total = self.num_buckets if isinstance(self.num_buckets, int) else torch.tensor(self.num_buckets).prod().item()
        padded = attention_mask is not None and not attention_mask.bool().all()
        found.append(out.view(*vectors.shape[:2], num_hashes, -1) % (total+padded))
        return out
    with patch.object(hf.LSHSelfAttention, '_hash_vectors', hear): yield found

@contextmanager
def our_buckets():
    "Bucket ids of each hash of our models (b, h, r, n)"
    from reformer_nb.hasher import BucketHasher
    found,inner = [],BucketHasher.forward
    def hear(self, *args, **options):
        found.append(inner(self, *args, **options))
        return found[-1]
    with patch.object(BucketHasher, 'forward', hear): yield found
