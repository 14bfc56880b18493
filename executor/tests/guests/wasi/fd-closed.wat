;; A stream that was closed is closed for writing and for closing.
(module
  (import "wasi_snapshot_preview1" "fd_close" (func $fd_close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (func $must (param $holds i32) (param $code i32)
    (if (i32.eqz (local.get $holds)) (then (call $proc_exit (local.get $code)))))
  (func (export "_start")
    (call $must (i32.eqz (call $fd_close (i32.const 1))) (i32.const 1))
    (call $must (i32.eq (call $fd_write (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 32)) (i32.const 8)) (i32.const 2))
    (call $must (i32.eq (call $fd_close (i32.const 1)) (i32.const 8)) (i32.const 3))))
