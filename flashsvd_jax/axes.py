"""One glossary of axis names, used in shapes, comments and einsum subscripts throughout.

letter  name       meaning
b       batch      sequences computed together
t       tokens     positions of this call (queries)
s       slots      positions held in the cache (keys)
d       embed      model width, hidden_size
n       heads      query heads (as a weight axis: heads * head_dim)
k       kv_heads   key/value heads (as a weight axis: kv_heads * head_dim)
g       group      query heads per key/value head
h       head_dim   width of one head
f       mlp        intermediate width of the MLP
r       rank       inner width of a factorized weight
v       vocab      tokens known
l       labels     classes of a classification head
-       groups     blocks of a block-diagonal second factor
-       positions, types   rows of tables that are added to an embedding
i, o    -          input and output axis of a projection in general
"""
