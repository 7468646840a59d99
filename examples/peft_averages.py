"An average of LoRA adapters: of what is trained only, and saved as PEFT saves adapters"
import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fastswa.averaging import ema
from fastswa.integrations.transformers import AveragesCallback

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
torch.manual_seed(0)
ids = (torch.randint(32, (160, 1)) + torch.arange(8)) % 32      # short texts that count upwards
data = [dict(input_ids=o, labels=o) for o in ids]
base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2))
base.save_pretrained(f'{folder}/base')
model = get_peft_model(base, LoraConfig(r=4, target_modules=['c_attn'], fan_in_fan_out=True, task_type='CAUSAL_LM'))

args = TrainingArguments(folder, num_train_epochs=2, per_device_train_batch_size=8, learning_rate=0.02,
                         eval_strategy='epoch', save_strategy='no', report_to='none', disable_tqdm=True)
callback = AveragesCallback(ema=ema(half_life='0.05dur'))
trainer = Trainer(model, args, train_dataset=data[:128], eval_dataset=data[128:], callbacks=[callback])
trainer.train()

averaged = callback.averages['ema'].weights
print(len(averaged), 'tensors are averaged, of', len(model.state_dict()))
with callback.averages.using('ema'): model.save_pretrained(f'{folder}/ema')
loaded = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(f'{folder}/base'), f'{folder}/ema')
assert all(torch.equal(p, averaged[name]) for name, p in loaded.named_parameters() if name in averaged)
