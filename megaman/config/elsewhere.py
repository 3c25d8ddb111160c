"""What kohya, diffusers and others call the settings of a training run: a table, for letters alone would
mislead.
"""

_CACHED = "leave it out: latents and text embeddings are always cached"
_CAPTIONS = "captions are .txt files beside the pictures, or a metadata.jsonl, in --data_dir"
_PRESERVED = "--preserve_weight, which keeps the class without pictures of it"
_TEXT_ENCODER = "--text_encoder_lr, above 0 to train the text encoders too"
_FIXED = "leave it out: it can't be changed here"
_BUCKETS = "--crop bucket, the default"
_BASES = "leave it out: the base itself brings and says it"
_MASKS = "--alpha_mask for transparent pictures; a NAME.mask.png beside a picture counts by itself"
_LOCAL = "leave it out: nothing is uploaded"
ELSEWHERE = {
    **dict.fromkeys(("lr", "unet_lr"), "--learning_rate"),
    **dict.fromkeys(("network_dim", "rank", "dim", "r", "lora_r", "lora_dim"), "--lora_rank"),
    **dict.fromkeys(("network_alpha", "alpha"), "--lora_alpha"),
    **dict.fromkeys(("network_dropout", "rank_dropout", "module_dropout", "dropout"), "--lora_dropout"),
    "network_args": "--lora_targets, --use_dora or --use_rslora",
    "network_module": "leave it out: a LoRA is trained, --lora_targets says of what",
    **dict.fromkeys(("network_weights", "lora_weights", "lora_path"), "--init_lora"),
    "dim_from_weights": "leave it out: --init_lora brings its rank along",
    **dict.fromkeys(
        ("model", "base_model", "ckpt", "pretrained_model_name_or_path"), "--pretrained_model_name"
    ),
    **dict.fromkeys(("save_every_n_steps", "save_every_n_epochs", "checkpointing_steps"), "--save_steps"),
    **dict.fromkeys(("save_last_n_steps", "save_last_n_epochs"), "--checkpoints_total_limit"),
    "save_state": "leave it out: every checkpoint keeps it, as --checkpoints_total_limit says",
    **dict.fromkeys(("save_model_as", "save_precision"), "leave it out: every tool reads what is written"),
    "resume": "--resume_from_checkpoint",
    **dict.fromkeys(("steps", "max_steps", "num_steps", "train_steps"), "--max_train_steps"),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "max_train_epochs"), "--num_train_epochs"),
    "batch_size": "--train_batch_size",
    **dict.fromkeys(
        ("train_data_dir", "instance_data_dir", "dataset_name", "dataset_config", "image_dir"), "--data_dir"
    ),
    **dict.fromkeys(
        ("in_json", "caption_column", "image_column", "caption_extension", "caption_extention"), _CAPTIONS
    ),
    **dict.fromkeys(("general_threshold", "thresh"), "--caption_threshold"),
    "undesired_tags": "--caption_without",
    **dict.fromkeys(("repeats", "num_repeats", "dataset_repeats"), "a folder's name in --data_dir: 10_name"),
    **dict.fromkeys(("instance_prompt", "trigger_word", "token", "placeholder_token"), "--trigger"),
    **dict.fromkeys(("class_prompt", "class_tokens"), "--preserve_class, together with --preserve_weight"),
    **dict.fromkeys(("reg_data_dir", "class_data_dir", "num_class_images"), _PRESERVED),
    **dict.fromkeys(("with_prior_preservation", "prior_loss_weight"), _PRESERVED),
    "output_name": "--output_dir: the file is always megaman_lora.safetensors",
    **dict.fromkeys(("xformers", "enable_xformers_memory_efficient_attention"), "--attention xformers"),
    **dict.fromkeys(("sdpa", "mem_eff_attn"), "--attention sdpa"),
    **dict.fromkeys(("fp8_base", "fp8_base_unet", "load_in_8bit"), "--base_weights int8"),
    "fp16": "--mixed_precision fp16",
    "bf16": "--mixed_precision bf16",
    **dict.fromkeys(
        ("full_fp16", "full_bf16", "precision", "dtype"),
        "--mixed_precision: the LoRA itself is always float32",
    ),
    **dict.fromkeys(
        ("lowram", "lowvram", "medvram", "highvram"),
        "leave it out; --gradient_checkpointing saves memory",
    ),
    "optimizer_type": "--optimizer",
    "use_8bit_adam": "--optimizer adamw8bit",
    "use_lion_optimizer": "--optimizer: there is no Lion",
    "adam_weight_decay": "--weight_decay",
    **dict.fromkeys(("optimizer_args", "adam_beta1", "adam_beta2", "adam_epsilon"), _FIXED),
    **dict.fromkeys(("lr_scheduler_num_cycles", "lr_num_cycles"), _FIXED),
    **dict.fromkeys(("lr_scheduler_power", "lr_power", "lr_scheduler_args", "loss_type"), _FIXED),
    **dict.fromkeys(("huber_c", "huber_schedule", "min_timestep", "max_timestep"), _FIXED),
    **dict.fromkeys(("vae", "revision", "tokenizer_name", "no_half_vae"), _BASES),
    "lr_scheduler_type": "--lr_scheduler",
    **dict.fromkeys(("multires_noise_iterations", "adaptive_noise_scale"), "--noise_offset"),
    **dict.fromkeys(("warmup_steps", "lr_warmup", "warmup_ratio"), "--lr_warmup_steps"),
    "scale_lr": "leave it out: --learning_rate is taken as it is given",
    "min_snr_gamma": "--snr_gamma",
    "use_ema": "--ema_decay",
    **dict.fromkeys(("sample_prompts", "validation_prompts"), "--validation_prompt"),
    **dict.fromkeys(
        ("sample_every_n_steps", "sample_every_n_epochs", "validation_epochs"), "--validation_steps"
    ),
    "keep_tokens": "--keep_tags",
    "shuffle_caption": "--shuffle_tags",
    "caption_dropout_rate": "--caption_dropout",
    **dict.fromkeys(("flip_aug", "random_flip"), "--flip"),
    **dict.fromkeys(("masked_loss", "masked_training", "conditioning_data_dir"), _MASKS),
    "color_aug": "leave it out: colours stay as they are",
    "center_crop": "--crop center",
    "random_crop": "--crop random",
    **dict.fromkeys(("enable_bucket", "min_bucket_reso", "max_bucket_reso"), _BUCKETS),
    **dict.fromkeys(("bucket_reso_steps", "bucket_no_upscale"), _BUCKETS),
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "vae_batch_size"), _CACHED),
    **dict.fromkeys(("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), _CACHED),
    "weighted_captions": "leave it out: a caption's words all weigh the same",
    "clip_skip": "leave it out: it isn't trained with",
    "max_token_length": "--max_tokens",
    **dict.fromkeys(("v2", "sdxl", "variant", "zero_terminal_snr"), _BASES),
    "v_parameterization": "--prediction_type v_prediction",
    **dict.fromkeys(("train_text_encoder", "learning_rate_te", "text_encoder_lr1"), _TEXT_ENCODER),
    **dict.fromkeys(("learning_rate_te1", "learning_rate_te2", "text_encoder_lr2"), _TEXT_ENCODER),
    "network_train_unet_only": "leave it out: only the UNet is trained, unless --text_encoder_lr is given",
    "network_train_text_encoder_only": "leave it out: the UNet is always trained",
    **dict.fromkeys(("stop_text_encoder_training", "train_text_encoder_frac"), "--text_encoder_stop"),
    **dict.fromkeys(
        ("max_data_loader_n_workers", "persistent_data_loader_workers", "dataloader_num_workers"),
        "leave it out: there is nothing to load while it trains",
    ),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_model_id", "huggingface_repo_id"), _LOCAL),
    "max_train_samples": "leave it out: all pictures in --data_dir are trained on",
    **dict.fromkeys(("local_rank", "num_processes"), "leave it out: accelerate launch gives it"),
    **dict.fromkeys(("device", "gpu"), "leave it out: the best device there is is taken"),
    "log_with": "--report_to",
    **dict.fromkeys(("log_config", "log_tracker_config"), "leave it out: the settings are always recorded"),
    "config_file": "--config",
    "torch_compile": "--compile",
    "debug_dataset": "--dry_run",
}
