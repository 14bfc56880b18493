;; A WASI preview 1 program: writes a file into the first folder that it was given, reads it back, and prints that.
(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_pread" (func $pread (param i32 i32 i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "file")
  (data (i32.const 16) "\"kept\"")
  ;; Vectors: what is written, and where it is read to.
  (data (i32.const 32) "\10\00\00\00\06\00\00\00")
  (data (i32.const 48) "\80\00\00\00\40\00\00\00")
  (func $must (param $errno i32)
    (if (local.get $errno) (then (call $exit (local.get $errno)))))
  (func (export "_start")
    ;; Descriptor 3 is the folder; 1 makes a file that is not there; rights: fd_read, fd_write.
    (call $must (call $open (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 4) (i32.const 1)
      (i64.const 0x66) (i64.const 0x66) (i32.const 0) (i32.const 64)))
    (call $must (call $write (i32.load (i32.const 64)) (i32.const 32) (i32.const 1) (i32.const 68)))
    (call $must (call $pread (i32.load (i32.const 64)) (i32.const 48) (i32.const 1) (i64.const 0) (i32.const 72)))
    ;; As much as was read.
    (i32.store (i32.const 52) (i32.load (i32.const 72)))
    (call $must (call $write (i32.const 1) (i32.const 48) (i32.const 1) (i32.const 68)))))
