;; Blocks in the host for an hour, where neither fuel nor epochs reach it.
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store8 (i32.const 8) (i32.const 0))                          ;; a clock subscription
    (i32.store (i32.const 16) (i32.const 1))                          ;; of the monotonic clock
    (i64.store (i32.const 24) (i64.const 3600000000000))              ;; in one hour
    (drop (call $poll (i32.const 0) (i32.const 128) (i32.const 1) (i32.const 256)))))
