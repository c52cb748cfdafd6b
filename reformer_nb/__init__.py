__version__ = "0.0.1"
from .feed_forward import Chunk as Chunk, FeedForward as FeedForward
from .language_model import ReformerLM as ReformerLM
from .lsh import LSHAttention as LSHAttention, lsh_attention as lsh_attention
from .reformer import Reformer as Reformer
from .reversible import ReversibleSequence as ReversibleSequence
from .self_attention import LSHSelfAttention as LSHSelfAttention
from .training import Trainer as Trainer
